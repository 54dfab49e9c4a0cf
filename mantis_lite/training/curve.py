"""metrics.jsonl -> a picture of the loss."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure


def draw_curve(metrics: Path, picture: Path) -> None:
    """Draw the loss of every logged step, and of every evaluation, as a PNG."""
    logs = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(log["step"], log[key]) for log in logs if key in log]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=label,
                marker="o" if len(points) < 30 else None,
                markersize=3,
            )
    axes.set(xlabel="step", ylabel="loss", title="loss a trained token (held out: mean over packs)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=150)
