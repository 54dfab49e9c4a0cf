"""Batches from DataLoader workers, any of which may die: of memory, of a decoder, of a container's small /dev/shm."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator

import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader, get_worker_info

from ..data.collate import Batch
from ..data.deaths import MOST_DEATHS, TOLD, died, hear_in_turn
from ..errors import DataError

log = logging.getLogger("mantis_lite")


class WorkerError(DataError):
    """Workers that die again and again."""


class Doing:
    """What each worker is at, as (process, sample) in memory that they share with the trainer."""

    def __init__(self, workers: int, named: Callable[[int], str]) -> None:
        self.table = torch.full((max(1, workers), 2), -1).share_memory_()
        self.named = named

    def __call__(self, sample: int) -> None:
        """Told by a worker of the sample that it begins."""
        if info := get_worker_info():
            self.table[info.id] = torch.tensor([os.getpid(), sample])

    def gone(self) -> set[int]:
        """The workers that are there no more, waited for as one that dies may not be gone yet."""
        for _ in range(20):
            there = {process.pid for process in torch.multiprocessing.active_children()}
            if found := {process for process in self.table[:, 0].tolist() if process > 0} - there:
                return found
            time.sleep(0.05)
        return set()

    def last(self, processes: set[int]) -> str:
        """The samples that these were at, in words."""
        found = [self.named(sample) for process, sample in self.table.tolist() if process in processes and sample >= 0]
        return ", ".join(found) or "a sample that is not known"


class Deaths:
    """The deaths of a loader's workers, of which so many are forgiven."""

    def __init__(self, doing: Doing) -> None:
        self.doing = doing
        self.at: list[str] = []

    def count(self, error: Exception) -> None:
        """Note the death that an error tells of. Raises WorkerError at the fourth, and any other error."""
        gone = set() if isinstance(error, RuntimeError) else self.doing.gone()  # before the others end as well
        self.at.append(self.doing.last(died(error) or gone))
        if len(self.at) > MOST_DEATHS:
            raise WorkerError(
                f"data: {len(self.at)} DataLoader workers died, at {'; '.join(self.at)}\n"
                "  Look at these rows; where memory or /dev/shm is short, lower train.dataloader_num_workers."
            ) from error
        log.warning("a DataLoader worker died at %s; it is begun anew", self.at[-1])


class Feed:
    """The batches of a loader, the first of which an iterator gives, in the same order when workers die and begin anew.

    `taken` were skipped before the first. Raises WorkerError at the fourth death.
    """

    def __init__(self, loader: DataLoader, first: Generator[Batch], taken: int, doing: Doing) -> None:
        self.loader, self.first, self.taken = loader, first, taken
        self.batches = first
        self.deaths = Deaths(doing)
        self.hears = loader.num_workers > 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def close(self) -> None:
        """End the workers, which would wait for what nobody asks until garbage is collected."""
        self.batches.close()

    def __next__(self) -> Batch:
        while True:
            try:
                batch = next(self.batches)
            except TOLD as error:
                self.deaths.count(error)
                self.batches = iter(skip_first_batches(self.loader, self.taken))
            else:
                if self.hears:
                    hear_in_turn()
                    self.hears = False
                self.taken += 1
                return batch
