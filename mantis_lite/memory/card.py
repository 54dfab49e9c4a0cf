"""The card that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .estimate import CONTEXT, GIB

USABLE = 0.9897
"""How much of a card a process can have: an H100 of 80 had 79.18 GiB (benchmarks/results/gpu_step_idefics2.json)."""


@dataclass(frozen=True)
class Card:
    """A GPU's memory: `gib` as it is sold, and the bytes of it that a process can have."""

    gib: float
    usable: int

    @property
    def words(self) -> str:
        return f"a card of {self.gib:g} GiB, of which a process can have {self.usable / GIB:.2f}"


def card_of(gib: float) -> Card:
    """A card as it is sold."""
    return Card(gib, int(gib * USABLE * GIB))


def card_at_hand() -> Card | None:
    """The GPU of this machine, where it has one: less what others hold of it now, a desktop or another run."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved() + CONTEXT
    return Card(round(total / GIB / USABLE), min(total, free + own))
