"""The page of a run, made from the files in its folder alone: while it trains, and of one that was killed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from ..pages import html, pieces
from .charts import Line, line_of, svg
from .jsonlines import lines_of
from .lock import lives
from .run_files import FACTS, GENERATIONS, METRICS, SKIPPED

RATE = "learning_rate"
COLUMNS = 8
"""Times at which a row was answered that are shown: the first, and the last."""
UNTOLD = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens")
"""What is logged of an evaluation and says nothing of the model."""
REFRESH = 10
"""Seconds after which a browser asks for the page again, while there may be more to come."""


class Chart(NamedTuple):
    """Lines over the steps, and what their last points are."""

    title: str
    now: str
    drawn: str


class Answered(NamedTuple):
    """A held-out row: its prompt in text and pictures, what it says, and what the model said after which steps."""

    where: str
    pieces: list[tuple[str, str]]
    pictures_left: int
    expected: str
    answers: list[tuple[int, str, bool]]
    left: int


class Measure(NamedTuple):
    """What an evaluation said first, before any step where it was asked then, and what it says now."""

    name: str
    first_step: int
    first: float | None
    step: int
    last: float | None


def page(run_dir: Path, facts: dict[str, Any] | None = None) -> bytes:
    """The page as HTML, for which no request is made; by the run itself, which knows its facts, or by another process.

    Raises DataError where the folder is no run's, and OSError.
    """
    own = facts is not None
    alive = own or lives(run_dir)
    facts = facts or facts_in(run_dir)
    ended = facts.get("ended") if own or not alive else None  # else of the time before: it goes on, or begins anew
    finished = ended is not None and ended["how"] == "finished"
    logs = lines_of(run_dir / METRICS)
    steps = [log for log in logs if "loss" in log]
    return html(
        "training/run.html",
        facts=facts,
        name=run_dir.resolve().name,
        state=_state(ended, alive),
        training=ended is None and alive,
        refresh=0 if finished else REFRESH,
        now=steps[-1] if steps else {},
        step=logs[-1]["step"] if logs else facts["from_step"],
        loss=_last(steps, "loss"),
        held_out=_last(logs, "eval_loss"),
        charts=list(_charts(logs, facts["estimate"] or {})),
        measures=list(_measures([log for log in logs if "eval_runtime" in log])),
        answered=list(_answered(lines_of(run_dir / GENERATIONS), facts["answered"])),
        skipped=lines_of(run_dir / SKIPPED),
        spikes=[log["step"] for log in steps if log.get("spike")],
        commands=facts["next"]["finished" if finished else "stopped"],
        clock=clock,
    )


def facts_in(run_dir: Path) -> dict[str, Any]:
    """What was known of a run as it began. Raises DataError where the folder holds none."""
    remedy = "Name the folder of a run that has begun: its run_dir."
    try:
        return json.loads((run_dir / FACTS).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{run_dir}: holds no run, as there is no {FACTS}\n  {remedy}") from None
    except ValueError as error:
        raise DataError(f"{run_dir / FACTS} is damaged: {error}\n  Go on with the run, which writes it anew.") from None


def _state(ended: dict[str, Any] | None, training: bool) -> str:
    if ended is not None:
        return ended["how"]
    return "training" if training else "killed, or its machine has failed: it ended without saying so"


def _charts(logs: Sequence[dict[str, Any]], estimate: dict[str, Any]) -> Iterator[Chart]:
    """A chart of each thing that was logged, one after the other."""
    drawn = [
        ("loss", [line_of(logs, "loss", "training"), line_of(logs, "eval_loss", "held out")], "{:.4g}"),
        ("learning rate", list(_rates(logs)), "{:.3g}"),
        ("norm of the gradient", [line_of(logs, "grad_norm", "norm")], "{:.3g}"),
        ("tokens a second", [line_of(logs, "tokens_per_second", "tokens a second")], "{:,.0f}"),
        ("samples a second", [line_of(logs, "samples_per_second", "samples a second")], "{:,.3g}"),
        ("how full packs are, %", [line_of(logs, "fill", "full", 100)], "{:.1f}"),
        ("GiB of the GPU at most, tensors", list(_memory(logs, estimate)), "{:.2f}"),
        ("GiB of the host's memory", [line_of(logs, "host_memory_gib", "held")], "{:.2f}"),
    ]
    for title, lines, form in drawn:
        shown = [line for line in lines if line.steps]
        if shown:
            now = ", ".join(f"{line.name} " * (len(lines) > 1) + form.format(line.values[-1]) for line in shown)
            yield Chart(title, now, svg(lines, title))


def _rates(logs: Sequence[dict[str, Any]]) -> Iterator[Line]:
    """That of train.learning_rate, and those of parts that have their own."""
    yield line_of(logs, RATE, "learning rate")
    for name in dict.fromkeys(name for log in logs for name in log if name.startswith(f"{RATE}_")):
        yield line_of(logs, name, name.removeprefix(f"{RATE}_").replace("_", " "))


def _memory(logs: Sequence[dict[str, Any]], estimate: dict[str, Any]) -> Iterator[Line]:
    """What was measured, and what was said beforehand."""
    measured = line_of(logs, "memory_gib", "measured")
    yield measured
    if measured.steps and "tensors" in estimate:
        yield Line("estimated", [0, measured.steps[-1]], [estimate["tensors"]] * 2, flat=True)


def _measures(evaluations: Sequence[dict[str, Any]]) -> Iterator[Measure]:
    if not evaluations:
        return
    first, last = evaluations[0], evaluations[-1]
    for name, value in last.items():
        if name.startswith("eval_") and name not in UNTOLD and isinstance(value, int | float | None):
            yield Measure(name.removeprefix("eval_"), first["step"], first.get(name), last["step"], value)


def _answered(lines: Sequence[dict[str, Any]], asked: Sequence[dict[str, Any]]) -> Iterator[Answered]:
    """The rows that were answered, each with its answers through time."""
    by_row = defaultdict(list)
    for line in lines:
        by_row[line["where"], line["id"]].append(line)
    for row in asked:
        said = by_row[row["where"], row["id"]]
        if not said:
            continue
        shown = said if len(said) <= COLUMNS else [said[0], *said[-(COLUMNS - 1) :]]
        answers = [(line["step"], line["answer"], line["answer"].strip() == line["expected"].strip()) for line in shown]
        prompt = pieces(said[0]["prompt"], row["pictures"])
        yield Answered(row["where"], prompt, row["left"], said[0]["expected"], answers, len(said) - len(shown))


def _last(logs: Sequence[dict[str, Any]], key: str) -> float | None:
    return next((log[key] for log in reversed(logs) if log.get(key) is not None), None)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(3723.4)
    '1:02:03'
    """
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
