"""How a run that goes on is shown: a bar, lines for a log file, JSON lines, or nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from ..errors import RecipeError
from .page import UNTOLD, clock

How = Literal["auto", "bar", "lines", "json", "quiet"]
"""`auto` is a bar at a terminal and in a notebook, and lines elsewhere."""

OFTEN = 10.0
"""Seconds between two lines, at least, but for evaluations and the last step."""


@contextmanager
def progress(how: How, say: Callable[[str], None]) -> Iterator[Sequence[TrainerCallback]]:
    """What shows a run, to be given to it; lines go to `say`."""
    if how == "auto":
        console = Console()
        widgets = console.is_jupyter and find_spec("ipywidgets") is not None
        how = "bar" if console.is_terminal or widgets else "lines"
    callbacks = {"lines": [Lines(say)], "json": [JsonLog(say)], "quiet": []}
    if how == "bar":
        with Bar() as bar:
            yield [bar]
    elif how in callbacks:
        yield callbacks[how]
    else:
        raise RecipeError(f"show: {how} is no way to show a run\n  Set one of auto, bar, {', '.join(callbacks)}.")


class Bar(TrainerCallback):
    """Steps, loss, tokens a second, memory and the time that is left, as one line; evaluations stay above it."""

    def __init__(self) -> None:
        self.progress = Progress(MofNCompleteColumn(), BarColumn(12), TextColumn("{task.fields[logged]}"))

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()  # and give the cursor back, whatever happened

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, logged="")
        if state.is_world_process_zero:
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, logged=in_words({**logs, "learning_rate": None}))
        elif logs and "eval_runtime" in logs and state.is_world_process_zero:
            self.progress.console.print(evaluated(state.global_step, logs), highlight=False, markup=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


class Lines(TrainerCallback):
    """A line for what was logged, no more often than a reader of a log file wants."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.due = say, 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero:
            return
        step, now = state.global_step, time.monotonic()
        if "eval_runtime" in logs:
            self.say(evaluated(step, logs))
        elif "loss" in logs and (now >= self.due or step == state.max_steps):
            self.due = now + OFTEN
            self.say(f"step {step:,}/{state.max_steps:,}  {in_words(logs)}")


class JsonLog(TrainerCallback):
    """Everything that is logged, as lines of JSON."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and state.is_world_process_zero:
            self.say(json.dumps({"event": "log", "step": state.global_step, **{k: _known(v) for k, v in logs.items()}}))


def _known(value: Any) -> Any:
    """A value, or None where it is no number, which JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_words(logs: dict[str, Any]) -> str:
    """Loss, learning rate, tokens a second, memory and the time that is left, as far as they were logged."""
    found = [f"loss {logs['loss']:.4g}"]
    if logs.get("learning_rate") is not None:
        found.append(f"lr {logs['learning_rate']:.2g}")
    if "tokens_per_second" in logs:
        found.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "memory_held_gib" in logs:
        found.append(f"{logs['memory_held_gib']:.1f} GiB")
    if "seconds_left" in logs:
        found.append(f"{clock(logs['seconds_left'])} left")
    return "  ".join(found)


def evaluated(step: int, logs: dict[str, Any]) -> str:
    """What an evaluation came to."""
    values = {name.removeprefix("eval_"): value for name, value in logs.items() if name not in UNTOLD}
    shown = [f"{name} {value:.4g}" for name, value in values.items() if name != "epoch" and isinstance(value, float)]
    return f"step {step:,}  held out: {', '.join(shown)}"
