"""Lengths and budgets -> packs. Pure arithmetic: no torch, no files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .packs import Packs


class Length(NamedTuple):
    """What a sample takes of a pack: tokens of the language model and positions of the vision tower."""

    tokens: int
    patches: int


PATCH_UNITS = 64
"""The patch budget is counted in this many units, a sample's share rounded up: few distinct values keep the search
short, and rounding up cannot exceed the budget."""


def plan(lengths: Sequence[Length] | np.ndarray, budget: Length, seed: int, epoch: int = 0) -> Packs:
    """Group samples into packs that stay within both budgets; packs and equal lengths come in a seeded random order.

    Best-fit decreasing (Johnson 1973) over all samples: the longest first, each into the fullest pack that has room
    for its tokens and its patches. `lengths` is (S, 2), tokens and patches; every index appears exactly once. A
    `budget.patches` of 0 sets no limit on patches. Every sample must fit a pack of its own.

    >>> sorted(map(sorted, plan([Length(6, 0), Length(5, 0), Length(4, 0)], Length(10, 0), seed=0)))
    [[0, 2], [1]]
    """
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1, 2)
    assert (sizes[:, 0] <= budget.tokens).all(), "a sample larger than a pack"
    units = _patch_units(sizes[:, 1], budget.patches)
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(sizes))
    order = order[np.lexsort((-units[order], -sizes[order, 0]))]  # stable: equal samples stay shuffled
    pack_of, packs = _best_fit(sizes[order, 0], units[order], budget.tokens)
    members = order[np.argsort(pack_of, kind="stable")].astype(np.int32)
    made = Packs(members, np.cumsum(np.bincount(pack_of, minlength=packs), dtype=np.int64))
    return made.take(random.permutation(packs))


def fill(lengths: Sequence[Length] | np.ndarray, packs: int, max_length: int) -> float:
    """The share of the packs' token positions that hold a token."""
    return float(np.asarray(lengths).reshape(-1, 2)[:, 0].sum() / (packs * max_length)) if packs else 0.0


def _patch_units(patches: np.ndarray, budget: int) -> np.ndarray:
    if not budget:
        return np.zeros_like(patches)
    assert (patches <= budget).all(), "a sample with more patches than a pack"
    return -(-patches * PATCH_UNITS // budget)


def _best_fit(tokens: np.ndarray, units: np.ndarray, max_length: int) -> tuple[np.ndarray, int]:
    """The pack of every sample (sorted, longest first), and the number of packs.

    Packs with the same room left are interchangeable, so they are kept together, and a run of equal samples is placed
    in one go: the work grows with the number of distinct lengths, not of samples.
    """
    pack_of = np.empty(len(tokens), dtype=np.int64)
    rooms = _Rooms()
    packs = 0
    change = np.flatnonzero((np.diff(tokens) != 0) | (np.diff(units) != 0)) + 1
    for start, end in zip([0, *change.tolist()], [*change.tolist(), len(tokens)], strict=True):
        if start == end:
            continue
        size, need = int(tokens[start]), int(units[start])
        while start < end:
            found = rooms.tightest(size, need)
            if found is None:  # open as many packs as the rest of the run fills
                room, left = max_length, PATCH_UNITS
                each = min(room // max(size, 1), left // need if need else end - start)
                ids = list(range(packs, packs + -(-(end - start) // each)))
                packs += len(ids)
            else:
                room, left = found
                each = min(room // max(size, 1), left // need if need else end - start)
                ids = rooms.take(room, left, -(-(end - start) // each))
            full, rest = divmod(min(end - start, each * len(ids)), each)
            pack_of[start : start + full * each] = np.repeat(ids[:full], each)
            rooms.put(room - each * size, left - each * need, ids[:full])
            start += full * each
            if rest:
                pack_of[start : start + rest] = ids[full]
                rooms.put(room - rest * size, left - rest * need, ids[full : full + 1])
                start += rest
    return pack_of, packs


class _Rooms:
    """Open packs by the room they have left: patch units -> a bit set of token rooms, and the packs of each."""

    def __init__(self) -> None:
        self.bits: defaultdict[int, int] = defaultdict(int)
        self.packs: defaultdict[tuple[int, int], list[int]] = defaultdict(list)

    def tightest(self, tokens: int, units: int) -> tuple[int, int] | None:
        """The least token room that holds `tokens`, among packs with `units` left; then the least units."""
        found = None
        for left, bits in self.bits.items():
            if left >= units and bits.bit_length() > tokens:
                above = bits >> tokens
                candidate = ((above & -above).bit_length() - 1 + tokens, left)
                found = candidate if found is None or candidate < found else found
        return found

    def take(self, room: int, left: int, count: int) -> list[int]:
        packs = self.packs[room, left]
        taken = packs[-count:]
        del packs[-count:]
        if not packs:
            self.bits[left] ^= 1 << room
        return taken

    def put(self, room: int, left: int, packs: list[int]) -> None:
        if packs and room:
            self.packs[room, left] += packs
            self.bits[left] |= 1 << room
