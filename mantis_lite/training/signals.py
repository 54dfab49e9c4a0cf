"""A signal that would end a run has it finish its step, save and stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..data.clips import SIGNALS
from ..errors import Stopped

GRACE = 10
"""Seconds that a DataLoader worker lives on after a SIGTERM."""


class Signals(TrainerCallback):
    """While entered, notes the first of SIGNALS; at the end of the step the trainer saves and stops.

    An evaluation is left off at once, after saving what there is, and owed when the run goes on. A second Ctrl-C ends
    the process.
    """

    def __init__(self, save: Callable[[], Path]) -> None:
        self.save = save
        self.caught: int | None = None
        self.interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has none
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.caught = agreed(self.caught, args.device)
        if self.caught and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            args.load_best_model_at_end = False  # that is for the end of a run

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Ranks walk through an evaluation in step, but need not be asked to agree on each of its many.
        if self.caught and args.world_size == 1:
            raise Stopped(self.caught, self.save() if state.global_step else None)

    def _note(self, number: int, frame: object) -> None:
        if self.interrupted and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.interrupted |= number == signal.SIGINT
        self.caught = self.caught or number
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        said = f"\n{signal.Signals(number).name}: finishing the step and saving{again}\n"
        os.write(2, said.encode())  # whatever this interrupted may be writing through Python's own


def agreed(caught: int | None, device: torch.device) -> int | None:
    """The signal that any rank has caught, the same on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return caught
    found = torch.tensor(caught or 0, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found) or None


def leave_signals(worker: int = 0) -> None:
    """Leave them to the trainer, of a DataLoader worker: it lives on until the step has what it needs.

    SIGTERM is also how a trainer that fails ends its workers, and is heeded after a while.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever the trainer's process has it do
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
