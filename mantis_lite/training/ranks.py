"""The processes of a run: which one this is, and what they do together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

log = logging.getLogger("mantis_lite")

PATIENCE = timedelta(hours=24)
"""How long processes wait for the first, which may have a million rows to read, or a checkpoint to write."""


@dataclass(frozen=True)
class Ranks:
    """One process of a run's `size`, the `rank`-th; on its machine the `local`-th, which is its GPU.

    `group` is one of the CPUs, to wait for each other and to tell small things; None where a process is alone.
    Each pack is shared by `sequence` processes, one after the other.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    group: distributed.ProcessGroup | None = None
    sequence: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def at_once(self) -> int:
        """How many packs are worked on at the same time."""
        return self.size // self.sequence

    @property
    def stretch(self) -> int:
        """Which part of a pack is this process's, from 0."""
        return self.rank % self.sequence

    def wait(self) -> None:
        """Wait until every process is here."""
        self._together(distributed.barrier)

    def told(self, value: Any = None) -> Any:
        """What the first process tells."""
        values = [value]
        self._together(lambda group: distributed.broadcast_object_list(values, src=0, group=group))
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        values = [value] * self.size
        self._together(lambda group: distributed.all_gather_object(values, value, group=group))
        return values

    def highest(self, number: int) -> int:
        """The highest of the numbers that the processes have."""
        found = torch.tensor(number)
        self._together(lambda group: distributed.all_reduce(found, distributed.ReduceOp.MAX, group))
        return int(found)

    def all(self, flag: bool) -> bool:
        """Whether it is so for every process."""
        return not self.highest(not flag)

    def _together(self, does: Callable[[distributed.ProcessGroup], object]) -> None:
        """Do something with the other processes; where one has ended, which says why itself, end as well."""
        if self.group is None:
            return
        try:
            does(self.group)
        except RuntimeError as error:
            if "closed by peer" not in str(error) and "reset by peer" not in str(error):
                raise
            log.warning("process %d ends, as another has", self.rank)
            raise SystemExit(1) from None


ALONE = Ranks()


def world(environ: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Rank, number and local rank of this process, as torchrun or another launcher has set them; 0, 1, 0 alone.

    SLURM's own are read where `srun` has started several tasks and nothing else says.

    >>> world({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    (3, 8, 1)
    >>> world({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"})
    (3, 4, 1)
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        return rank, size, int(environ.get("LOCAL_RANK", rank))
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, size = int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"])
        return rank, size, int(environ["SLURM_LOCALID"])
    return 0, 1, 0


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of those that a launcher or scheduler has started."""
    return "RANK" in environ or world(environ)[1] > 1


def join() -> Ranks:
    """Join the other processes of the run, if a launcher has started any; a process joins once."""
    if not is_launched():
        return ALONE
    rank, size, local = world()
    if not distributed.is_initialized():
        if torch.cuda.is_available():
            local %= torch.cuda.device_count()  # a scheduler may show each process its own GPU alone
            torch.cuda.set_device(local)
        for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local}.items():
            os.environ[name] = str(value)  # where SLURM alone had set them, for accelerate
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(rank, size, local, distributed.new_group(timeout=PATIENCE, backend="gloo"))
