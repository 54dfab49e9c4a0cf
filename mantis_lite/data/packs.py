"""Packs of samples, millions of them, in two flat arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

BLANK = -1
"""Stands in a pack for a blank picture rather than a sample: the vision tower has something to do then."""


@dataclass(frozen=True, eq=False)
class Packs(Sequence[list[int]]):
    """Packs in order, each a list of indices of samples, or BLANK; an empty one is a pack too.

    members (M,) int32, all packs' end to end, and ends (P,) int64, one behind the last of each; neither can be written.

    >>> packs = Packs.of([[4, 2], [], [7, BLANK]])
    >>> packs[0], packs[1:], len(packs)
    ([4, 2], Packs.of([[], [7, -1]]), 3)
    """

    members: np.ndarray
    ends: np.ndarray

    def __post_init__(self) -> None:
        assert self.members.dtype == np.int32 and self.ends.dtype == np.int64
        assert len(self.members) == (self.ends[-1] if len(self.ends) else 0)
        self.members.flags.writeable = self.ends.flags.writeable = False

    @classmethod
    def of(cls, packs: Iterable[Sequence[int]]) -> Packs:
        """From packs one by one."""
        rows = list(packs)
        members = np.fromiter((index for row in rows for index in row), np.int32)
        return cls(members, np.cumsum([len(row) for row in rows], dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence[Packs]) -> Packs:
        """The packs of all parts, one part after the other."""
        before = np.cumsum([0, *(len(part.members) for part in parts[:-1])])
        ends = [part.ends + shift for part, shift in zip(parts, before, strict=True)]
        return cls(np.concatenate([part.members for part in parts]), np.concatenate(ends))

    @property
    def sizes(self) -> np.ndarray:
        """How many samples each pack has, (P,); a blank picture is none."""
        return self._sums((self.members != BLANK).astype(np.int64))

    @property
    def samples(self) -> np.ndarray:
        """All packs' samples in order, without blank pictures."""
        return self.members[self.members != BLANK]

    @property
    def firsts(self) -> np.ndarray:
        """The first sample of each pack, none of which may be empty, (P,)."""
        return self.members[self.ends - self._widths]

    def sums(self, values: np.ndarray, blank: ArrayLike = 0) -> np.ndarray:
        """What samples' `values` (S, ...) come to in each pack, (P, ...); that of a blank picture is `blank`."""
        found = values[self.members]  # BLANK reads the last sample's, which is replaced
        found[self.members == BLANK] = blank
        return self._sums(found)

    def take(self, order: np.ndarray) -> Packs:
        """The packs at these places, in this order."""
        widths = self._widths[order]
        starts, ends = self.ends[order] - widths, np.cumsum(widths, dtype=np.int64)
        return Packs(self.members[np.repeat(starts - (ends - widths), widths) + np.arange(widths.sum())], ends)

    def digest(self) -> str:
        """A hash of all packs."""
        return sha256(self.ends.tobytes() + self.members.tobytes()).hexdigest()

    @property
    def _widths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        found = np.zeros((len(self), *values.shape[1:]), dtype=values.dtype)
        full = np.flatnonzero(self._widths)  # an empty pack has no place of its own among the members
        if len(full):
            found[full] = np.add.reduceat(values, (self.ends - self._widths)[full])
        return found

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> list[int]: ...
    @overload
    def __getitem__(self, at: slice) -> Packs: ...
    def __getitem__(self, at: int | slice) -> list[int] | Packs:
        if isinstance(at, slice):
            return self._slice(*at.indices(len(self)))
        end = self.ends[at]
        start = self.ends[at - 1] if at % len(self) else 0
        return self.members[start:end].tolist()

    def _slice(self, start: int, stop: int, step: int) -> Packs:
        if step != 1:
            return self.take(np.arange(start, stop, step))
        first = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop] - first
        return Packs(self.members[first : first + (int(ends[-1]) if len(ends) else 0)], ends)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Packs):
            return NotImplemented
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.members, other.members)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [str(self[at]) for at in range(min(len(self), 8))]
        return f"Packs.of([{', '.join(shown)}{', ...' if len(self) > 8 else ''}])"
