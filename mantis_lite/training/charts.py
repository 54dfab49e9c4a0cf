"""Lines over the steps of a run, as pictures of its loss and as SVG in its page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .jsonlines import lines_of

MOST = 400
"""Points of a line; of more, each is a mean of several."""
COLOURS = ("#4078c0", "#d9822b", "#3a9a5b", "#b0568f", "#8a7a2e")
SVG = {"#000000": "currentColor", "#b0b0b0": "currentColor", **{c: f"var(--c{at})" for at, c in enumerate(COLOURS)}}
"""What is drawn in these colours is drawn in the page's own, by day and by night."""


class Line(NamedTuple):
    """Points (steps, values) of one name; `flat` is a bound rather than a course."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    flat: bool = False


def line_of(logs: Sequence[dict[str, Any]], key: str, name: str, scale: float = 1) -> Line:
    """A value of the logs that have it as a finite number, thinned by means to MOST points."""
    found = [(log["step"], log[key] * scale) for log in logs if math.isfinite(_number(log.get(key)))]
    steps, values = np.array(found, float).reshape(-1, 2).T
    every = max(1, math.ceil(len(steps) / MOST))
    starts = np.arange(0, len(steps), every)
    if every > 1:
        counts = np.diff([*starts, len(steps)])
        values = np.add.reduceat(values, starts) / counts
        steps = steps[[*(starts[1:] - 1), -1]]
    return Line(name, steps.tolist(), values.tolist())


def svg(lines: Sequence[Line], what: str) -> str:
    """A chart to stand in a page, in the page's colours and letters; `what` keeps its ids from those of others."""
    figure = _figure(lines, (4.2, 2.4), (0.17, 0.13, 0.8, 0.82))
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": what}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for colour, own in SVG.items():
        drawn = drawn.replace(colour, own)
    return drawn


def draw_curve(metrics: Path, picture: Path) -> None:
    """Draw the loss of every logged step, and of every evaluation, as a PNG. Raises OSError."""
    logs = lines_of(metrics)
    lines = [line_of(logs, "loss", "training"), line_of(logs, "eval_loss", "held out")]
    figure = _figure(lines, (7, 4), (0.1, 0.12, 0.87, 0.8))
    figure.axes[0].set(xlabel="step", ylabel="loss", title="loss a trained token (held out: mean over packs)")
    figure.savefig(picture, dpi=150)


def _figure(lines: Sequence[Line], size: tuple[float, float], room: tuple[float, float, float, float]) -> Figure:
    figure = Figure(figsize=size)
    axes = figure.add_axes(room)
    for line, colour in zip(lines, COLOURS[: len(lines)], strict=True):
        if not line.steps:
            continue
        marker = "o" if len(line.steps) < 30 and not line.flat else None
        style: dict[str, Any] = {"linestyle": "--" if line.flat else "-", "marker": marker, "markersize": 3}
        axes.plot(line.steps, line.values, label=line.name, color=colour, linewidth=1.3, **style)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")
    axes.grid(alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else math.nan
