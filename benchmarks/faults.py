"""What goes wrong in a run, at a step: callbacks of a trainer, which a job of `benchmarks.forks` asks for by name."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback


class KillAt(TrainerCallback):
    """Kills its own process at the end of a step, before it is saved or after."""

    def __init__(self, step: int, saved: bool) -> None:
        self.step, self.saved = step, saved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.saved:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class AtStep(TrainerCallback):
    """Does something to the model as a step begins, which are counted from 1."""

    def __init__(self, step: int, does: Callable[[torch.nn.Module], None]) -> None:
        self.step, self.does = step, does

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.does(kwargs["model"])


class InEvaluation(TrainerCallback):
    """Sends its own process a signal as it evaluates after a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


class HoldAt(TrainerCallback):
    """Waits as a step begins until a file is there."""

    def __init__(self, step: int, file: str) -> None:
        self.step, self.file = step, file

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        while state.global_step + 1 == self.step and not os.path.exists(self.file):
            time.sleep(0.01)


class Progress(TrainerCallback):
    """Notes in a file, which a kill of its own process leaves whole, where it began, what it took and what it saved."""

    def __init__(self, file: str) -> None:
        self.opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _note(self, what: str, step: int) -> None:
        os.write(self.opened, f"{what} {step}\n".encode())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("begin", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("step", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("saved", state.global_step)


def faults(job: dict[str, Any]) -> list[TrainerCallback]:
    """The callbacks that a job asks for.

    `kill_at` a step, once it is `saved` or not; `signals` as (step, signal); `signal_in_evaluation`
    of a step; `hold_at` (step, file) until it is there; `poison` as (step, "weights" or
    "gradient"); `kill_worker` at a step; `limit` as (step, bytes) of each file that is written then; `progress` to a
    file.
    """
    found: list[TrainerCallback] = []
    if "kill_at" in job:
        found.append(KillAt(job["kill_at"], job.get("saved", True)))
    for step, number in job.get("signals", ()):
        found.append(AtStep(step, partial(_signal, number)))
    if "signal_in_evaluation" in job:
        found.append(InEvaluation(*job["signal_in_evaluation"]))
    if "hold_at" in job:
        found.append(HoldAt(*job["hold_at"]))
    if "poison" in job:
        step, what = job["poison"]
        found.append(AtStep(step, _poison_weights if what == "weights" else _poison_gradient))
    if "kill_worker" in job:
        found.append(AtStep(job["kill_worker"], lambda model: multiprocessing.active_children()[0].kill()))
    if "limit" in job:
        step, size = job["limit"]
        found.append(AtStep(step, partial(_limit_files, size)))
    if "progress" in job:
        found.append(Progress(job["progress"]))
    return found


def _limit_files(size: int, model: torch.nn.Module) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _signal(number: int, model: torch.nn.Module) -> None:
    os.kill(os.getpid(), number)


def _trained(model: torch.nn.Module) -> torch.nn.Parameter:
    return next(parameter for parameter in model.parameters() if parameter.requires_grad)


def _poison_weights(model: torch.nn.Module) -> None:
    _trained(model).data.fill_(torch.nan)


def _poison_gradient(model: torch.nn.Module) -> None:
    """One gradient, as a picture that overflows gives one."""

    def nan_once(gradient: torch.Tensor) -> torch.Tensor:
        hook.remove()
        return gradient * torch.nan

    hook = _trained(model).register_hook(nan_once)
