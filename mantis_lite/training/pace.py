"""How fast a run goes, and what is left of it, counted by its plan."""

from __future__ import annotations

import time

import numpy as np
import psutil
import torch

from ..data.schedule import Schedule
from ..memory.estimate import GIB


class Pace:
    """Tokens and samples of every step, by the plan, and the time that steps took.

    TRL counts a pack of M-RoPE rows for one token, and transformers a pack for one sample. Of `lengths` (N,) each
    sample has its own; a full pack has `budget` tokens, None where samples are not packed. Evaluations and saves are no
    step's time, but what is left is reckoned with them.
    """

    def __init__(self, schedule: Schedule, lengths: np.ndarray, budget: int | None, gpu: bool = False) -> None:
        packs = schedule.packs
        self.tokens = np.concatenate([[0], packs.sums(lengths, schedule.touch or 0).cumsum()])
        self.samples = np.concatenate([[0], packs.sizes.cumsum()])
        self.per_step, self.budget, self.gpu = schedule.per_step, budget, gpu
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start the clocks after so many steps."""
        self.first = self.logged = step
        self.begun = self.since = time.monotonic()
        self.busy = self.walked = 0.0
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()  # of a run before in the same process

    def stepped(self) -> None:
        """A step was taken."""
        now = time.monotonic()
        self.busy += now - self.since
        self.walked += now - self.since
        self.since = now

    def rested(self) -> None:
        """What was done until now was no step's."""
        self.since = time.monotonic()
        if not self.walked:  # an evaluation before the first step says nothing of what is left
            self.begun = self.since

    def done(self, step: int) -> int:
        """Packs that so many steps take."""
        return min(step * self.per_step, len(self.tokens) - 1)

    def figures(self, step: int) -> dict[str, float]:
        """What the steps since the last figures came to, up to this one: tokens and samples a second, fill, s left."""
        first, last = self.done(self.logged), self.done(step)
        tokens, samples = self._between(self.logged, step)
        found: dict[str, float] = {"num_tokens": int(self.tokens[last])}
        if self.busy and last > first:
            found |= {"tokens_per_second": tokens / self.busy, "samples_per_second": samples / self.busy}
            found |= {"fill": tokens / ((last - first) * self.budget)} if self.budget else {}
            whole = (time.monotonic() - self.begun) / self._between(self.first, step)[0]
            found["seconds_left"] = whole * int(self.tokens[-1] - self.tokens[last])
        self.logged, self.busy = step, 0.0
        return found | memory(self.gpu)

    def summary(self, step: int, seconds: float) -> dict[str, float]:
        """Of all steps since the clocks were started, in place of transformers' own."""
        tokens, samples = self._between(self.first, step)
        return {"train_samples_per_second": samples / seconds, "train_tokens_per_second": tokens / seconds}

    def _between(self, step: int, later: int) -> tuple[int, int]:
        """Tokens and samples of the steps from one to another."""
        first, last = self.done(step), self.done(later)
        return int(self.tokens[last] - self.tokens[first]), int(self.samples[last] - self.samples[first])


def memory(gpu: bool) -> dict[str, float]:
    """GiB that tensors took of the GPU at most, and what the allocator held for them; without one, of the host."""
    if not gpu:
        return {"host_memory_gib": psutil.Process().memory_info().rss / GIB}
    held = torch.cuda.max_memory_reserved()
    return {"memory_gib": torch.cuda.max_memory_allocated() / GIB, "memory_held_gib": held / GIB}
