"""Rows -> what becomes of each, a chunk at a time and in order: read here, or in processes beside this one."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..errors import DataError, FitError, SampleError
from ..process import cores
from ..recipe import PackingRecipe, Problem
from .content import Content, content_of
from .deaths import MOST_DEATHS, TOLD, died, hear_in_turn
from .encode import Encoder
from .labels import RowLabels, read_labels
from .lengths import LengthCache, Measured, records_of
from .sample import Sample
from .shards import ShardRows
from .source import Rows

CHUNK = 256
"""Rows measured together, so that the tokenizer works on many texts at once."""
AHEAD = 2
"""Chunks that are tokenised at once, so that no core waits while Python takes what was found."""
ROWS_EACH = 2_000
"""Rows for which a process is worth its start: fewer are read before it would have begun."""
MOST_WORKERS = 32
"""Processes that read: the disk is the slowest then."""

KEPT = np.dtype([("source", "i4"), ("row", "i4"), ("lengths", "i4", 2), ("images", "i4"), ("digest", "i8")])
"""Where a row that can be trained on stands, its tokens and patches, its pictures, and what is in it."""

log = logging.getLogger("mantis_lite")


class Read(NamedTuple):
    """What became of a chunk's rows: those `kept`, with their labels, and the faults of others, both in order.

    `measured` are the records to be remembered; `oversize` counts the rows that were dropped for their size.
    """

    kept: np.ndarray
    labels: list[RowLabels]
    faults: list[SampleError]
    measured: np.ndarray
    notices: Counter[str]
    oversize: int


@dataclass(frozen=True)
class Chunks(Sequence[Read]):
    """The rows of all sources in chunks, each read when it is asked for.

    With a `problem` rows have labels; `drops` leaves out those that no pack can hold, which are faults else.
    """

    rows: Sequence[Rows]
    encoder: Encoder
    cache: LengthCache
    packing: PackingRecipe
    drops: bool
    problem: Problem | None

    @cached_property
    def stretches(self) -> list[tuple[int, range]]:
        """The source of each chunk, and its rows there."""
        return [
            (source, range(start, min(start + CHUNK, len(rows))))
            for source, rows in enumerate(self.rows)
            for start in range(0, len(rows), CHUNK)
        ]

    def __len__(self) -> int:
        return len(self.stretches)

    def __getitem__(self, at):
        with ThreadPoolExecutor(1) as pool:
            return self.begin(at, pool)()

    def begin(self, at: int, pool: Executor) -> Callable[[], Read]:
        """Parse a chunk's rows and let `pool` tokenise those not remembered; what is returned waits and answers."""
        source, stretch = self.stretches[at]
        if isinstance(rows := self.rows[source], ShardRows):
            return partial(self._of_shards, source, rows, stretch)
        faults: dict[int, SampleError] = {}
        found: dict[int, tuple[Sample, RowLabels | None]] = {}
        for row in stretch:
            try:
                sample = self.rows[source].sample(row)
                found[row] = sample, read_labels(sample, self.problem) if self.problem else None
            except SampleError as error:
                faults[row] = error
        contents = {row: content_of(sample) for row, (sample, _) in found.items()}
        keys = {row: content.key for row, content in contents.items() if content}
        remembered = zip(keys, self.cache.find(list(keys.values())), strict=True)
        lengths = {row: length for row, length in remembered if length}
        unknown = [row for row in found if row not in lengths]
        measured = self.encoder.begin_measure([found[row][0] for row in unknown], pool)

        def finish() -> Read:
            fresh: dict[bytes, Measured] = {}
            for row, length in zip(unknown, measured(), strict=True):
                if isinstance(length, SampleError):
                    faults[row] = length
                    continue
                lengths[row] = length
                if row in keys:
                    fresh[keys[row]] = length
            return self._sorted_out(source, found, contents, lengths, faults, records_of(fresh))

        return finish

    def _of_shards(self, source: int, rows: ShardRows, stretch: range) -> Read:
        """What became of rows that were measured when their shards were made; none of them is read."""
        kept = np.zeros(len(stretch), KEPT)
        kept["source"], kept["row"] = source, stretch
        kept["lengths"] = np.stack([rows.of("tokens", stretch), rows.of("patches", stretch)], axis=1)
        kept["images"], kept["digest"] = rows.of("images", stretch), rows.of("digest", stretch)
        most = np.array([self.packing.max_length, self.packing.max_patches or np.iinfo(np.int32).max])
        large: np.ndarray = np.any(kept["lengths"] > most, axis=1)
        fits = ~large
        labels: list[RowLabels] = []
        faults: list[SampleError] = []
        for at in range(len(stretch)) if self.problem else np.flatnonzero(large).tolist():
            stub = rows.stub(stretch[at])
            if large[at]:
                tokens, patches = kept["lengths"][at].tolist()
                fault = too_large(stub, Measured(tokens, patches, int(kept["images"][at])), self.packing)
                faults += [fault] if fault and not self.drops else []
                continue
            assert self.problem
            try:
                labels.append(read_labels(stub, self.problem))
            except SampleError as error:
                faults.append(error)
                fits[at] = False
        return Read(kept[fits], labels, faults, records_of({}), Counter(), int(large.sum()) if self.drops else 0)

    def _sorted_out(
        self,
        source: int,
        found: dict[int, tuple[Sample, RowLabels | None]],
        contents: dict[int, Content | None],
        lengths: dict[int, Measured],
        faults: dict[int, SampleError],
        measured: np.ndarray,
    ) -> Read:
        kept, labels, notices, oversize = [], [], Counter[str](), 0
        for row, (sample, of_row) in found.items():
            if row in faults:
                continue
            length, content = lengths[row], contents[row]
            if error := too_large(sample, length, self.packing):
                oversize += self.drops
                if not self.drops:
                    faults[row] = error
                continue
            for notice in (*sample.notices, *self.encoder.frames.notices(sample, length)):
                notices[notice] += 1
            digest = content.digest if content else 0  # a file that came while it was looked for
            kept.append((source, row, (length.tokens, length.patches), length.images, digest))
            if of_row is not None:
                labels.append(of_row)
        in_order = [faults[row] for row in sorted(faults)]
        return Read(np.array(kept, KEPT), labels, in_order, measured, notices, oversize)


def too_large(sample: Sample, length: Measured, packing: PackingRecipe) -> FitError | None:
    """What to say of a sample that no pack can hold, or None."""
    long = length.tokens > packing.max_length
    if not (long or (packing.max_patches and length.patches > packing.max_patches)):
        return None
    images = f"({length.images} images)"
    if long:
        found = f"needs {length.tokens:,} tokens {images}; packing.max_length is {packing.max_length:,}"
        fewer = ", take fewer frames of a clip" if sample.videos else ""
        remedy = f"Raise packing.max_length{fewer}, or set data.oversize=drop."
    else:
        found = f"needs {length.patches:,} patches {images}; packing.max_patches is {packing.max_patches:,}"
        remedy = "Raise packing.max_patches, lower media.max_image_size, or set data.oversize=drop."
    return FitError(sample.where, found, remedy, sample.id)


def workers_for(rows: int) -> int:
    """Processes that read so many rows soonest: as many as this one may use cores, or fewer or none for few rows."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:  # those may start none
        return 0
    workers = min(rows // ROWS_EACH, cores(), MOST_WORKERS)
    return workers if workers > 1 else 0


def read_all(chunks: Chunks, workers: int) -> Generator[Read]:
    """All chunks in order; with no workers, while some are tokenised the next is parsed. Raises DataError."""
    return _beside(chunks, workers) if workers else _here(chunks)


def _here(chunks: Chunks) -> Generator[Read]:
    with ThreadPoolExecutor(AHEAD) as pool:
        begun = deque[Callable[[], Read]]()
        for at in range(len(chunks)):
            begun.append(chunks.begin(at, pool))
            if len(begun) > AHEAD:
                yield begun.popleft()()
        for finish in begun:
            yield finish()


def _beside(chunks: Chunks, workers: int) -> Generator[Read]:
    """As read by processes forked from this one, begun anew where one of them dies."""
    done = deaths = 0
    while done < len(chunks):
        try:
            for read in _loaded(chunks, range(done, len(chunks)), workers):
                yield read
                done += 1
        except TOLD as error:
            died(error)
            deaths += 1
            source, stretch = chunks.stretches[done]
            where = chunks.rows[source].where(stretch[0])
            if deaths > MOST_DEATHS:
                raise DataError(
                    f"data: {deaths} processes that read rows died, the last at {where} or behind it\n"
                    "  Look at these rows, and at how much memory is free."
                ) from error
            log.warning("a process that reads rows died at %s or behind it; it is begun anew", where)


def _loaded(chunks: Chunks, wanted: Iterable[int], workers: int) -> Iterator[Read]:
    """Chunks by torch's processes. They are forked: an encoder is functions, which cannot be sent to others."""
    loader: DataLoader = DataLoader(
        chunks,  # type: ignore[arg-type]
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        collate_fn=as_it_is,
        generator=torch.Generator(),  # or the numbers that are drawn later would depend on who reads
    )
    with _one_thread_each():
        found = iter(loader)
    heard = hear_in_turn()
    try:
        yield from found
    finally:
        if heard is not None:
            signal.signal(signal.SIGCHLD, heard)


def as_it_is(found: Any) -> Any:
    """For a DataLoader, which else makes tensors of what is found."""
    return found


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that are forked meanwhile tokenise in one thread: they are as many as the cores already."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
