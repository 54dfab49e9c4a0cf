"""What is measured of a tool: by the Trainer of transformers, which all of them train by, in each one's environment."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections import Counter
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from transformers import Trainer, TrainerCallback

IGNORE = -100
RATE = 1e-12
"""A learning rate by which nothing changes, so that every round of every tool has the same loss."""


def begin(argument: str, *packages: str) -> tuple[dict[str, Any], Probe]:
    """The settings that the harness gave in JSON, and a probe that watches whatever trains from now on.

    Lines for the harness go out by what was standard output, and all else that is printed by standard error.
    """
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(argument)
    versions = {name: version(name) for name in ("torch", "transformers", *packages)}
    said.write(json.dumps({"versions": {"python": platform.python_version()} | versions}) + "\n")
    probe = Probe(settings, said)
    train = Trainer.train

    @wraps(train)
    def watched(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        probe.watch(trainer)
        return train(trainer, *args, **kwargs)

    Trainer.train = watched
    return settings, probe


class Probe(TrainerCallback):
    """Tells the harness of each round over all rows, and waits for its turn before the next; the first warms up.

    `ends` are the steps that end a round, where rounds have unlike many; `before` the seconds that went into the rows
    before there was a trainer.
    """

    def __init__(self, settings: dict[str, Any], said: TextIO) -> None:
        self.settings, self.said = settings, said
        self.ends: list[int] = []
        self.before = 0.0
        self.first_step: float | None = None
        self.trained = 0

    def clock(self, owner: Any, name: str) -> None:
        """Count what a function takes among the seconds before there is a trainer."""
        timed = getattr(owner, name)

        @wraps(timed)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return timed(*args, **kwargs)
            finally:
                self.before += time.perf_counter() - begun

        setattr(owner, name, clocked)

    def watch(self, trainer: Trainer) -> None:
        """Look at what goes into the loss and what comes out of it, and at how long its inputs take to make."""
        loss, batches = trainer.compute_loss, trainer.get_batch_samples

        def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            labels = int((inputs["labels"] != IGNORE).sum())  # before the tool takes them out
            self.counts.update(tokens=inputs["input_ids"].numel(), labels=labels)
            found = loss(model, inputs, *args, **kwargs)
            self.loss += float((found[0] if isinstance(found, tuple) else found).detach()) * labels
            return found

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            found = batches(*args, **kwargs)
            self.preparing += time.perf_counter() - begun
            return found

        self.trained = sum(each.numel() for each in trainer.model.parameters() if each.requires_grad)
        trainer.compute_loss, trainer.get_batch_samples = compute_loss, get_batch_samples
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.ends:
            each, left = divmod(state.max_steps, 1 + self.settings["rounds"])
            assert not left, "rounds of unlike many steps"
            self.ends = [each * (at + 1) for at in range(1 + self.settings["rounds"])]
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak
        self.held = memory("VmRSS")
        self._reset()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.first_step is None:
            self.first_step = time.time() - self.settings["started"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.ends:
            self.said.write(json.dumps(self._round()) + "\n")
            if state.global_step < self.ends[-1] and not sys.stdin.readline():
                raise SystemExit("the harness is gone")
            self._reset()

    def _reset(self) -> None:
        self.counts: Counter[str] = Counter()
        self.loss = self.preparing = 0.0
        self.begun = time.perf_counter()

    def _round(self) -> dict[str, Any]:
        return {
            "seconds": time.perf_counter() - self.begun,
            "preparing_seconds": self.preparing,
            "loss": self.loss / self.counts["labels"],
            **self.counts,
            "trained": self.trained,
            "peak_mb": (memory("VmHWM") - self.held) / 1024,
            "before_seconds": self.before,
            "first_step_seconds": self.first_step,
        }


def memory(name: str) -> int:
    """A figure of this process' memory as Linux has it, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
