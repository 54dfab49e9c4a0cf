"""Which samples are trained on one after the other, so that the shards they are in fit this machine's disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataError
from .packs import Packs
from .prepare import Samples
from .shards import ShardRows, Shards


def fetched_sets(samples: Samples) -> list[Shards]:
    """The sets of shards that samples are fetched from."""
    sets = {id(rows.shards): rows.shards for rows in samples.rows if isinstance(rows, ShardRows)}
    return [shards for shards in sets.values() if shards.fetched]


def count_windows(sets: Sequence[Shards]) -> int:
    """The fewest windows of which two fit the cache: that which is trained on, and the next. Raises DataError."""
    room = sets[0].cache.limit / 2
    most = max(len(shards.files) for shards in sets)
    for count in range(1, most + 1):
        largest = np.sum([shards.bytes_of_windows(count) for shards in sets], axis=0).max()
        if largest <= room:
            return count
    raise DataError(
        f"data.cache_size: {sets[0].cache.limit:,} bytes do not hold two shards of {sets[0].place.url}\n"
        f"  Raise it to {2 * int(largest):,} or more."
    )


def window_of(samples: Samples) -> np.ndarray | None:
    """The window of each sample (S,), a fair part of all sources each; None where nothing is fetched."""
    sets = fetched_sets(samples)
    if not sets:
        return None
    count = count_windows(sets)
    found = np.empty(len(samples), dtype=np.int64)
    for number, rows in enumerate(samples.rows):
        members = np.flatnonzero(samples.source == number)
        if isinstance(rows, ShardRows) and rows.shards.fetched:
            found[members] = rows.shards.window(rows.of("shard")[samples.row[members]], count)
        else:
            random = np.random.default_rng(number)
            found[random.permutation(members)] = np.arange(len(members)) * count // max(1, len(members))
    return found


def visits(packs: Packs, samples: Samples) -> list[tuple[int, int]]:
    """The windows that packs come from: each time it is another, the first pack and the window; none of one pack alone,
    as the costliest are that come early."""
    found = window_of(samples)
    if found is None:
        return []
    of_packs = found[packs.firsts]
    begins = np.flatnonzero(np.diff(of_packs, prepend=-1))
    begins = begins[np.diff(begins, append=len(packs)) > 1]
    begins = begins[np.diff(of_packs[begins], prepend=-1) != 0]
    return [(int(at), int(of_packs[at])) for at in begins]


def windows(samples: Samples, indices: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    """The indices of an epoch, window by window in a seeded random order; all at once where nothing is fetched."""
    found = window_of(samples)
    if found is None:
        return [indices]
    order = np.random.default_rng((seed, epoch, 2)).permutation(int(found.max()) + 1)
    return [part for window in order if len(part := indices[found[indices] == window])]
