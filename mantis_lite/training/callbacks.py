"""What a run does beside its steps."""

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
from transformers import TrainerCallback, set_seed

from ..data.prepare import Samples
from ..data.schedule import Schedule
from ..data.windows import count_windows, fetched_sets, visits
from ..errors import DataError
from .jsonlines import JsonLines
from .pace import Pace

log = logging.getLogger("mantis_lite")


class Seeds(TrainerCallback):
    """Has each step draw from a seed of its own, so that what it draws does not depend on what was drawn before.

    A run that goes on needs no state of a generator then (Salmon et al. 2011 draw by a counter likewise).
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        drawn = np.random.SeedSequence((args.seed, state.global_step, args.process_index)).generate_state(1)
        set_seed(int(drawn[0]))


class Intervals(TrainerCallback):
    """Has the run log, evaluate and save as often as its recipe says, not as its checkpoint did; and log at its end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer to metrics.jsonl: step, epoch, loss, learning rate, gradient norm, time, pace.

    What the trainers count of tokens and samples is replaced by what the plan says; `held_out` samples are evaluated.
    """

    def __init__(self, path: Path, schedule: Schedule, pace: Pace, held_out: int) -> None:
        self.lines, self.schedule, self.pace, self.held_out = JsonLines(path), schedule, pace, held_out

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.begin(state.global_step)
        if state.is_world_process_zero:
            self.lines.rewind(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.stepped()
        # The trainer walks through all epochs' packs once, and so counts them as one.
        state.epoch = self.schedule.epoch(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.rested()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.rested()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            logs |= self.pace.figures(state.global_step)
        tokens = int(self.pace.tokens[self.pace.done(state.global_step)])
        logs |= dict.fromkeys({"num_tokens", "eval_num_tokens"} & logs.keys(), tokens)
        if "eval_runtime" in logs:
            logs["eval_samples_per_second"] = self.held_out / logs["eval_runtime"]
        if "train_runtime" in logs:
            logs |= self.pace.summary(state.global_step, logs["train_runtime"])
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
