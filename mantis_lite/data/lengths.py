"""Lengths remembered by content, so that a second start tokenises nothing and opens no picture.

An index on disk holds them in the order of their keys, and is mapped rather than read. A run appends what it measures
to a piece of its own, which a killed one leaves behind; pieces go into the index when a run has measured all its rows,
and when the next one starts.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from ..files import alone, write_whole

INDEX, LOCK, PIECE = "index", "lock", ".piece"
STRETCH = 1 << 21
"""Records that are put in order at a time: 64 MiB of them."""

log = logging.getLogger("mantis_lite")


class Measured(NamedTuple):
    """What a sample comes to: tokens of the language model, positions of the vision tower, and pictures.

    `cut` are those pictures whose files have more behind the first, as an animation has.
    """

    tokens: int
    patches: int
    images: int
    cut: int = 0


RECORD = np.dtype([("key", "<u8", 2), *((name, "<i4") for name in Measured._fields)])
"""Of 32 bytes, so that none lies across two pages of a file: a page that a crash loses takes its keys along."""


def cache_dir() -> Path:
    """Where remembered lengths are kept: $MANTIS_LITE_CACHE, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MANTIS_LITE_CACHE") or Path(home) / "mantis_lite")


class LengthCache:
    """The remembered lengths of one encoder, in a folder named by its fingerprint.

    Several processes may use it at once. Where it cannot be written rows are measured again the next time, with a
    warning.
    """

    def __init__(self, fingerprint: str, folder: Path | None = None) -> None:
        self.folder = (folder or cache_dir()) / f"lengths-{fingerprint}"
        self._piece: int | None = None
        self._writable = True
        self._put_in_order()
        self._index = read_records(self.folder / INDEX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._let_go()
        if kind is None:
            self._put_in_order()

    def find(self, keys: Sequence[bytes]) -> list[Measured | None]:
        """What is remembered under each key of 16 bytes."""
        if not (len(keys) and len(self._index)):
            return [None] * len(keys)
        wanted = _numbers(keys)
        found = self._index[np.minimum(_places(self._index, wanted), len(self._index) - 1)]
        lengths = zip(*(found[name].tolist() for name in Measured._fields), strict=True)
        known = (found["key"] == wanted).all(1).tolist()
        return [Measured(*length) if there else None for there, length in zip(known, lengths, strict=True)]

    def add(self, records: np.ndarray) -> None:
        """Remember records: from here on they are safe from the end of this process, though not found by it."""
        if not (len(records) and self._writable):
            return
        try:
            if self._piece is None:
                self._piece = self._begin()
            content = records.tobytes()
            while content:  # a full disk takes a part of it, and says so when it is asked again
                content = content[os.write(self._piece, content) :]
        except OSError as error:
            self._give_up(error)

    def _begin(self) -> int:
        """A new piece, held by this process until it closes the file or ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self.folder / LOCK):  # or one that puts pieces in order could take it before it is held
            name = self.folder / f"{secrets.token_hex(8)}{PIECE}"
            piece = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            fcntl.lockf(piece, fcntl.LOCK_EX)
        return piece

    def _let_go(self) -> None:
        if self._piece is not None:
            os.close(self._piece)
            self._piece = None

    def _give_up(self, error: OSError) -> None:
        if self._writable:
            log.warning("lengths are not remembered: %s cannot be written: %s", self.folder, error.strerror)
        self._writable = False

    def _put_in_order(self) -> None:
        """Bring the pieces that no living process holds into the index."""
        if not any(self.folder.glob(f"*{PIECE}")):
            return
        try:
            with alone(self.folder / LOCK), _left(self.folder) as pieces:
                for part in self.folder.glob(f"{INDEX}.tmp-*"):  # of one that was killed here
                    part.unlink()
                found = [read_records(piece) for piece in pieces]
                if any(map(len, found)):
                    index = read_records(self.folder / INDEX)
                    write_whole(self.folder / INDEX, (part.tobytes() for part in in_order(index, found)))
                for piece in pieces:
                    piece.unlink()
        except OSError as error:
            self._give_up(error)


def records_of(lengths: Mapping[bytes, Measured]) -> np.ndarray:
    """Lengths by their keys of 16 bytes as records (N,)."""
    records = np.empty(len(lengths), RECORD)
    records["key"] = _numbers(lengths)
    for at, name in enumerate(Measured._fields):
        records[name] = [length[at] for length in lengths.values()]
    return records


def _numbers(keys: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)


def read_records(file: Path) -> np.ndarray:
    """The whole records (N,) of a file, mapped; none where there is no such file."""
    with suppress(OSError):
        if count := file.stat().st_size // RECORD.itemsize:
            return np.memmap(file, RECORD, "r", shape=(count,))
    return np.empty(0, RECORD)


@contextmanager
def _left(folder: Path) -> Iterator[list[Path]]:
    """The pieces that no living process holds; meanwhile this one does. Raises OSError."""
    with ExitStack() as held:
        found = []
        for piece in sorted(folder.glob(f"*{PIECE}")):
            opened = held.enter_context(piece.open("r+b"))
            with suppress(BlockingIOError, PermissionError):
                fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(piece)
        yield found


def _places(index: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each key (N, 2) stands in sorted records, or would: a binary search for all of them together.

    `numpy.searchsorted` needs a column by itself, and would copy it from the file each time.
    """
    first, last = np.zeros(len(keys), np.int64), np.full(len(keys), len(index))
    for _ in range(len(index).bit_length()):
        middle = (first + last) // 2
        at = index["key"][np.minimum(middle, len(index) - 1)]
        before = (at[:, 0] < keys[:, 0]) | ((at[:, 0] == keys[:, 0]) & (at[:, 1] < keys[:, 1]))
        before &= middle < last
        first, last = np.where(before, middle + 1, first), np.where(before, last, middle)
    return first


def in_order(index: np.ndarray, pieces: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The records of a sorted index and of pieces, sorted, each key once, a stretch of the keys at a time.

    Keys are hashes, so that stretches of as many keys have about as many records.
    """
    stretches = 1 + (len(index) + sum(map(len, pieces))) // STRETCH
    edges = [number * 2**64 // stretches for number in range(stretches)]
    starts = _places(index, np.array([(edge, 0) for edge in edges], np.uint64)).tolist()
    for (low, high), (start, end) in zip(pairwise([*edges, 2**64]), pairwise([*starts, len(index)]), strict=True):
        found = [index[start:end]]
        for piece in pieces:
            first = piece["key"][:, 0]
            found.append(piece[(first >= low) & (first <= high - 1)])
        records = np.concatenate(found)
        keys = records["key"]
        records = records[np.lexsort((keys[:, 1], keys[:, 0]))]
        yield records[np.append(True, (records["key"][1:] != records["key"][:-1]).any(1))] if len(records) else records
