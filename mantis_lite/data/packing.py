"""Lengths and budgets -> packs. Pure arithmetic: no torch, no files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .packs import BLANK, Packs


class Length(NamedTuple):
    """What a sample takes of a pack: tokens of the language model and positions of the vision tower."""

    tokens: int
    patches: int


PATCH_UNITS = 64
"""The patch budget is counted in this many units, a sample's share rounded up: few distinct values keep the search
short, and rounding up cannot exceed the budget."""

SLACK = 0.03
"""The share of their tokens that packs of equal cost have free at least, so that there is a choice of places."""


def plan(
    lengths: Sequence[Length] | np.ndarray, budget: Length, seed: int, epoch: int = 0, touch: int | None = None
) -> Packs:
    """Group samples into packs that stay within both budgets; packs and equal lengths come in a seeded random order.

    Best-fit decreasing (Johnson 1973) over all samples: the longest first, each into the fullest pack that has room
    for its tokens and its patches. `lengths` is (S, 2), tokens and patches; every index appears exactly once. A
    `budget.patches` of 0 sets no limit on patches. Every sample must fit a pack of its own. With `touch`, a pack
    without patches ends in a BLANK of so many tokens, for which there is room.

    >>> sorted(map(sorted, plan([Length(6, 0), Length(5, 0), Length(4, 0)], Length(10, 0), seed=0)))
    [[0, 2], [1]]
    """
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1, 2)
    assert (needed(sizes, touch) <= budget.tokens).all(), "a sample larger than a pack"
    units = _patch_units(sizes[:, 1], budget.patches)
    random = np.random.default_rng((seed, epoch))
    packs = _packed(sizes[:, 0], units, budget.tokens, random)
    if touch is not None:
        packs = _with_blanks(packs, sizes, units, budget.tokens - touch, random)
    return packs.take(random.permutation(len(packs)))


def needed(lengths: np.ndarray, touch: int | None) -> np.ndarray:
    """Tokens that a pack has for each sample alone, (S,): its own, and `touch` for a BLANK where it has no patches."""
    return lengths[:, 0] + np.where(lengths[:, 1] == 0, touch or 0, 0)


def spread(lengths: np.ndarray, costs: np.ndarray, cost: float, budget: Length, touch: int | None = None) -> Packs:
    """Group a few samples into packs of equal cost, at most about `cost`; budgets and `touch` are those of `plan`.

    The costliest first, each into the cheapest pack that has room for it (Graham 1969).

    >>> spread(np.array([[4, 0], [3, 0], [2, 0], [1, 0]]), np.array([4.0, 3.0, 2.0, 1.0]), 6.0, Length(9, 0))
    Packs.of([[0, 3], [1, 2]])
    """
    room = budget.tokens - (touch or 0)  # in any pack, as it is not known which will have no patches
    count = math.ceil(max(costs.sum() / cost, lengths[:, 0].sum() / ((1 - SLACK) * room)))
    rows: list[list[int]] = [[] for _ in range(count)]
    held, spent = np.zeros((count, 2), dtype=np.int64), np.zeros(count)
    for index in costs.argsort(kind="stable")[::-1].tolist():
        fits = held[:, 0] + lengths[index, 0] <= room
        if budget.patches:
            fits &= held[:, 1] + lengths[index, 1] <= budget.patches
        at = int(np.where(fits, spent, np.inf).argmin())
        if not fits[at]:  # a pack more
            at = len(rows)
            rows.append([])
            held, spent = np.append(held, [[0, 0]], axis=0), np.append(spent, 0.0)
        rows[at].append(index)
        held[at] += lengths[index]
        spent[at] += costs[index]
    packs = Packs.of(row for row in rows if row)
    return packs if touch is None else add_blanks(packs, lengths[:, 1])


def add_blanks(packs: Packs, patches: np.ndarray) -> Packs:
    """The packs, those whose samples have no `patches` (S,) with a BLANK at their end."""
    bare = packs.sums(patches) == 0
    return Packs(np.insert(packs.members, packs.ends[bare], np.int32(BLANK)), packs.ends + bare.cumsum())


def fill(lengths: Sequence[Length] | np.ndarray, packs: int, max_length: int) -> float:
    """The share of the packs' token positions that hold a token."""
    return float(np.asarray(lengths).reshape(-1, 2)[:, 0].sum() / (packs * max_length)) if packs else 0.0


def _patch_units(patches: np.ndarray, budget: int) -> np.ndarray:
    if not budget:
        return np.zeros_like(patches)
    assert (patches <= budget).all(), "a sample with more patches than a pack"
    return -(-patches * PATCH_UNITS // budget)


def longest_first(tokens: np.ndarray, units: np.ndarray, max_length: int, random: np.random.Generator) -> np.ndarray:
    """The order in which samples are packed: by tokens, then by patch units, equal ones at random."""
    order = random.permutation(len(tokens))
    # Both stable, so that equal samples stay shuffled, and of few bits, which numpy sorts by their digits.
    for left in (PATCH_UNITS - units, max_length - tokens):
        order = order[left[order].astype(np.min_scalar_type(left.max(initial=0))).argsort(kind="stable")]
    return order


def _packed(tokens: np.ndarray, units: np.ndarray, max_length: int, random: np.random.Generator) -> Packs:
    order = longest_first(tokens, units, max_length, random)
    pack_of, packs = _best_fit(tokens[order], units[order], max_length)
    members = order[np.argsort(pack_of, kind="stable")].astype(np.int32)
    return Packs(members, np.cumsum(np.bincount(pack_of, minlength=packs), dtype=np.int64))


def _with_blanks(
    packs: Packs, sizes: np.ndarray, units: np.ndarray, max_length: int, random: np.random.Generator
) -> Packs:
    """Packs with a BLANK where they need one; those without patches that have no room for it are packed anew."""
    full = (packs.sums(sizes[:, 1]) == 0) & (packs.sums(sizes[:, 0]) > max_length)
    text = packs.take(np.flatnonzero(full)).samples
    again = _packed(sizes[text, 0], units[text], max_length, random)
    packs = Packs.join([packs.take(np.flatnonzero(~full)), Packs(text[again.members], again.ends)])
    return add_blanks(packs, sizes[:, 1])


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
                ids = np.arange(packs, packs + -(-(end - start) // each))
                packs += len(ids)
            else:
                room, left = found
                each = min(room // max(size, 1), left // need if need else end - start)
                ids = rooms.take(room, left, -(-(end - start) // each))
            full, rest = divmod(min(end - start, each * len(ids)), each)
            pack_of[start : start + full * each] = ids[:full].repeat(each)
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
        self.packs: defaultdict[tuple[int, int], list[np.ndarray]] = defaultdict(list)

    def tightest(self, tokens: int, units: int) -> tuple[int, int] | None:
        """The least token room that holds `tokens`, among packs with `units` left; then the least units."""
        found = None
        for left, bits in self.bits.items():
            if left >= units and bits.bit_length() > tokens:
                above = bits >> tokens
                candidate = ((above & -above).bit_length() - 1 + tokens, left)
                found = candidate if found is None or candidate < found else found
        return found

    def take(self, room: int, left: int, count: int) -> np.ndarray:
        """The last `count` packs with this room, or all there are."""
        held = self.packs[room, left]
        taken = []
        while held and count > 0:
            ids = held.pop()
            if len(ids) > count:
                held.append(ids[:-count])
            taken.append(ids[-count:])
            count -= len(ids)
        if not held:
            self.bits[left] ^= 1 << room
        return taken[0] if len(taken) == 1 else np.concatenate(taken[::-1])

    def put(self, room: int, left: int, packs: np.ndarray) -> None:
        if len(packs) and room:
            self.packs[room, left].append(packs)
            self.bits[left] |= 1 << room
