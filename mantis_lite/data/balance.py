"""Packs -> groups of packs that cost about the same, so that GPUs that take one each are done together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .packs import Packs

LIMIT = 0.03
"""By how much the costliest pack of a group may be above the group's mean."""

BLUR = 0.01
"""Packs that differ by less in cost come in a random order: else a pack would be with its likes in every epoch."""

ROUNDS = 4
"""How often packs that have no group are made anew."""


class Grouped(NamedTuple):
    """Packs in groups, groups in a random order; one to a group of packs left over; how many groups are not alike."""

    packs: Packs
    left: Packs
    unlike: int


def group(
    packs: Packs,
    size: int,
    costs: Callable[[Packs], np.ndarray],
    repack: Callable[[np.ndarray, float], Packs] | None,
    random: np.random.Generator,
) -> Grouped:
    """Put packs into groups of `size` in a row that are alike in cost, LIMIT; the cheapest are left over.

    Groups are cut from the packs in order of their `costs`, (P,). Where there is a gap in them, the packs that fill no
    group are left over too. Those that cost more than any in a group, or all if they are more than a group, are packed
    anew by `repack(samples, cost)` into packs that each cost the same, at most about so much; where that does not help
    either, groups are cut across gaps, at first the costliest alone. The costliest pack is never left over.
    """
    for attempt in range(ROUNDS + 1):
        found = costs(packs)
        groups, left = _cut(found, size, random, unlike=0)
        above = found[left] > found[groups].max(initial=0.0)
        if len(left) <= size and not above.any():
            break
        if repack is None or attempt == ROUNDS:
            groups, left = _cut(found, size, random, unlike=1)
            if len(left) > size:
                groups, left = _cut(found, size, random, unlike=len(packs))
            break
        again = left[above] if above.any() else left
        made = repack(packs.take(again).samples, float(found.mean()))
        packs = Packs.join([packs.take(np.delete(np.arange(len(packs)), again)), made])
    unlike = int((found[groups].max(1) > (1 + LIMIT) * found[groups].mean(1)).sum()) if len(groups) else 0
    groups = random.permuted(random.permutation(groups), axis=1)  # no GPU has the costliest pack of each group
    return Grouped(packs.take(groups.ravel()), packs.take(left), unlike)


def _cut(costs: np.ndarray, size: int, random: np.random.Generator, unlike: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of packs by falling cost: (G, size) in groups, so many of which may be `unlike`, and of those in none."""
    blurred = costs * random.uniform(1, 1 + BLUR, len(costs))
    order = blurred.argsort()[::-1]
    windows = max(0, len(costs) - size)  # one fewer than there are: something is always left
    before = np.concatenate([[0.0], costs[order].cumsum()])
    means = (before[len(before) - 1 - windows : -1] - before[:windows]) / size
    alike = blurred[order][:windows] <= (1 + LIMIT) * means
    alike[:unlike] = True
    starts, at = [], 0
    while at < windows:
        if alike[at]:
            starts.append(at)
        at += size if alike[at] else 1
    grouped = np.array(starts, dtype=np.int64)[:, None] + np.arange(size)
    return order[grouped], np.delete(order, grouped.ravel())
