"""What is written and shown while a run trains."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, set_seed

from ..data.prepare import Samples
from ..data.schedule import Schedule
from ..data.windows import count_windows, fetched_sets, visits
from ..errors import DataError
from .jsonlines import JsonLines

log = logging.getLogger("mantis_lite")


class Seeds(TrainerCallback):
    """Has each step draw from a seed of its own, so that what it draws does not depend on what was drawn before.

    A run that goes on needs no state of a generator then (Salmon et al. 2011 draw by a counter likewise).
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        drawn = np.random.SeedSequence((args.seed, state.global_step, args.process_index)).generate_state(1)
        set_seed(int(drawn[0]))


class Intervals(TrainerCallback):
    """Has the run log, evaluate and save as often as its recipe says now, and not as its checkpoint did."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer to metrics.jsonl: step, epoch, loss, learning rate, gradient norm, time.

    `num_tokens` is counted from the packs' tokens (P,), in training order: TRL's own count takes a pack of M-RoPE rows
    for one token.
    """

    def __init__(self, path: Path, schedule: Schedule, pack_tokens: np.ndarray) -> None:
        self.lines, self.schedule = JsonLines(path), schedule
        self.tokens = np.concatenate([[0], pack_tokens.cumsum()])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.lines.rewind(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The trainer walks through all epochs' packs once, and so counts them as one.
        state.epoch = self.schedule.epoch(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            done = min(state.global_step * self.schedule.per_step, len(self.tokens) - 1)
            logs |= dict.fromkeys({"num_tokens", "eval_num_tokens"} & logs.keys(), int(self.tokens[done]))
            self.lines.append({"step": state.global_step, "time": time.time(), **logs})


class Aside(TrainerCallback):
    """Keeps parameters that the steps do not read in the host's memory meanwhile.

    Once the trainer has begun: it moves a whole model to the GPU before.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = parameters

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self.parameters:
            parameter.data = parameter.data.cpu()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self.parameters:
            parameter.data = parameter.data.to(args.device)


class Ahead(TrainerCallback):
    """Fetches the shards of the next window while the packs of one are trained on; what fails is tried by its reader.

    `visits` are the windows in the order of training, each with its first pack.
    """

    def __init__(self, schedule: Schedule, samples: Samples) -> None:
        self.visits = visits(schedule.packs, samples)
        self.per_step = schedule.per_step
        self.sets = fetched_sets(samples)
        self.windows = count_windows(self.sets) if self.sets else 0
        self.begun = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at = state.global_step * self.per_step
        coming = bisect_right(self.visits, at, key=lambda visit: visit[0])
        if self.begun < coming < len(self.visits):
            self.begun = coming
            window = self.visits[coming][1]
            threading.Thread(target=self._fetch, args=(window,), name="shards ahead", daemon=True).start()

    def _fetch(self, window: int) -> None:
        try:
            for shards in self.sets:
                shards.fetch(window, self.windows)
        except DataError as error:
            log.warning("not fetched ahead: %s", error)


class ProgressBar(TrainerCallback):
    """Steps, loss and the time that is left, as one line on the terminal."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()  # and give the cursor back, whatever happened

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, loss="-")
        if state.is_world_process_zero:
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()
