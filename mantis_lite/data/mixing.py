"""How often the rows of each source come in an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

BOOST = 1.1
"""Upstream's, so that an epoch has about as many rows as there are, although no source may be larger than all."""


def by_square_root(rows: Sequence[int], weights: Sequence[float]) -> list[float]:
    """The weights by which each source comes with int(total x min(1.1 sqrt(n) / sum of sqrt(n), 1)) rows an epoch.

    n are a source's `rows` as often as its own weight has them come, total is the sum of n. A source without rows
    keeps its weight. Upstream's dataset_balancing.
    """
    often = [round(count * weight) for count, weight in zip(rows, weights, strict=True)]
    total, roots = sum(often), sum(map(sqrt, often))
    found = []
    for count, coming, weight in zip(rows, often, weights, strict=True):
        share = min(BOOST * sqrt(coming) / roots, 1) if coming else 0
        found.append(int(total * share) / count if count else weight)
    return found
