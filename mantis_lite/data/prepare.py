"""A recipe's data -> the samples that can be trained on, with their lengths, and a count of all that cannot."""

from __future__ import annotations

import gc
import json
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from ..errors import DataError, FitError, SampleError
from ..recipe import DataRecipe, HeadRecipe, PackingRecipe, Problem, SourceRecipe, Task
from .content import Content, content_of
from .encode import Encoder
from .labels import Labels, RowLabels, first_named, label_notices, name_labels, read_labels
from .lengths import LengthCache, Measured
from .sample import Sample
from .shards import ShardRows, are_shards, open_shards
from .source import Rows, expand, open_source

CHUNK = 256  # rows measured together, so that the tokenizer works on many texts at once


@dataclass
class Samples(Sequence[Sample]):
    """The accepted samples of all sources, parsed when they are asked for.

    lengths (S, 2), tokens and patches; images (S,), pictures; source (S,) and row (S,) say where each stands, digest
    (S,) int64 what is in it; weights (sources,). targets (S, L) float32, or (S,) int64 classes, where samples have
    labels to be told.
    """

    rows: list[Rows]
    weights: list[float]
    source: np.ndarray
    row: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    digest: np.ndarray
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index):
        return self.rows[self.source[index]].sample(int(self.row[index]))

    def take(self, indices: np.ndarray) -> Samples:
        return replace(
            self,
            source=self.source[indices],
            row=self.row[indices],
            lengths=self.lengths[indices],
            images=self.images[indices],
            digest=self.digest[indices],
            targets=None if self.targets is None else self.targets[indices],
        )


@dataclass
class Prepared:
    """Training and held-out samples, and what became of every row that was read."""

    train: Samples
    held_out: Samples | None
    rejects: list[SampleError] = field(default_factory=list)
    notices: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0
    oversize: int = 0
    labels: Labels | None = None


def prepare(
    data: DataRecipe,
    packing: PackingRecipe,
    encoder: Encoder,
    seed: int = 42,
    task: Task = "chat",
    head: HeadRecipe | None = None,
    every_fault: bool = False,
) -> Prepared:
    """Read, check and measure every row; opens no picture or clip beyond its header.

    A row that cannot be trained on is an error, or with `on_bad_row=skip` is counted, and more than 1% of them is an
    error all the same. With a `head`, rows have labels: those it states, or all that the rows name. Raises SampleError,
    FitError, DataError; with `every_fault` none of them: `rejects` then has all that is wrong, of rows and of sources.
    """
    cache = LengthCache(encoder.fingerprint)
    prepared = Prepared(train=_samples([], array("q")), held_out=None)
    reader = _Reader(data, packing, encoder, cache, prepared, task, head, every_fault)
    with _no_cycle_collection():
        prepared.train = reader.read(data.sources)
        if isinstance(data.eval, str):
            prepared.held_out = reader.read([SourceRecipe(path=data.eval)])
    if isinstance(data.eval, float):
        order = np.random.default_rng(seed).permutation(len(prepared.train))
        held_out = max(1, round(len(order) * data.eval))
        prepared.held_out = prepared.train.take(np.sort(order[:held_out]))
        prepared.held_out.weights = [1.0] * len(prepared.held_out.weights)  # each is asked once
        prepared.train = prepared.train.take(np.sort(order[held_out:]))
    cache.save()
    if not len(prepared.train) and not every_fault:
        raise DataError(
            f"{data.sources[0].path}: no row is left to train on, of {prepared.rows_read} read\n"
            "  See why with `mantis-lite check`."
        )
    if len(prepared.train) and prepared.labels and prepared.train.targets is not None:
        with reader.whole():
            prepared.notices.update(label_notices(prepared.labels, prepared.train.targets))
    return prepared


def read_rows(
    data: DataRecipe, packing: PackingRecipe, encoder: Encoder, task: Task, labels: Labels | None = None
) -> Prepared:
    """As `prepare`, of rows that are not to be trained on: they need labels only where `labels` says which.

    Raises SampleError, FitError, DataError.
    """
    cache = LengthCache(encoder.fingerprint)
    prepared = Prepared(train=_samples([], array("q")), held_out=None, labels=labels)
    with _no_cycle_collection():
        prepared.train = _Reader(data, packing, encoder, cache, prepared, task).read(data.sources)
    cache.save()
    if not len(prepared.train):
        raise DataError(
            f"{data.sources[0].path}: no row is left, of {prepared.rows_read} read\n  See the rejected rows."
        )
    return prepared


def may_be_skipped(rows: int) -> int:
    """How many of so many rows: 1%, or one."""
    return max(1, rows // 100)


def refuse_too_many(prepared: Prepared) -> None:
    """Raise DataError where more rows were rejected than may be skipped."""
    rejects, rows = prepared.rejects, prepared.rows_read
    if len(rejects) > may_be_skipped(rows):
        raise DataError(
            f"{len(rejects)} of {rows} rows cannot be used ({len(rejects) / rows:.1%}), more than the 1% that may be "
            f"skipped; the first is\n  {rejects[0]}"
        )


def write_rejects(rejects: Sequence[SampleError], path: Path) -> None:
    """Append one line a rejected row: where, id, what was found and the remedy."""
    with path.open("a") as file:
        for reject in rejects:
            fields = {
                "where": reject.where,
                "id": reject.sample_id,
                "found": reject.found,
                "remedy": reject.remedy,
            }
            file.write(json.dumps(fields) + "\n")


def too_large(sample: Sample, length: Measured, packing: PackingRecipe) -> FitError | None:
    """What to say of a sample that no pack can hold, or None."""
    images = f"({length.images} images)"
    if length.tokens > packing.max_length:
        found = f"needs {length.tokens:,} tokens {images}; packing.max_length is {packing.max_length:,}"
        fewer = ", take fewer frames of a clip" if sample.videos else ""
        remedy = f"Raise packing.max_length{fewer}, or set data.oversize=drop."
    elif packing.max_patches and length.patches > packing.max_patches:
        found = f"needs {length.patches:,} patches {images}; packing.max_patches is {packing.max_patches:,}"
        remedy = "Raise packing.max_patches, lower media.max_image_size, or set data.oversize=drop."
    else:
        return None
    return FitError(sample.where, found, remedy, sample.id)


def _samples(opened: list[tuple[SourceRecipe, Rows]], kept: array[int]) -> Samples:
    table = np.array(kept, dtype=np.int64).reshape(-1, 6)
    rows, weights = [rows for _, rows in opened], [spec.weight for spec, _ in opened]
    return Samples(rows, weights, table[:, 0], table[:, 1], table[:, 2:4], table[:, 4], table[:, 5])


@contextmanager
def _no_cycle_collection() -> Iterator[None]:
    """Rows make many small objects without cycles: looking for cycles among them takes nearly half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Chunk(NamedTuple):
    """Rows on their way: parsed, looked up, and those that are not remembered given to the tokenizer."""

    samples: list[tuple[int, Sample, RowLabels | None]]
    contents: list[Content | None]
    lengths: list[Measured | None]
    unknown: list[int]
    measured: Callable[[], list[Measured | SampleError]]


@dataclass
class _Reader:
    data: DataRecipe
    packing: PackingRecipe
    encoder: Encoder
    cache: LengthCache
    prepared: Prepared
    task: Task = "chat"
    head: HeadRecipe | None = None
    every_fault: bool = False
    named: set[str] = field(default_factory=set)

    def read(self, sources: list[SourceRecipe]) -> Samples:
        opened = self._open(sources)
        kept = array("q")
        labels: list[RowLabels] = []
        with ThreadPoolExecutor(1) as pool:
            pending = deque[tuple[int, _Chunk]]()
            for number, (_, rows) in enumerate(opened):
                self.prepared.rows_read += len(rows)
                self.prepared.notices.update(rows.dropped)
                if isinstance(rows, ShardRows):
                    while pending:
                        self._finish(*pending.popleft(), kept, labels)
                    self._take(number, rows, kept, labels)
                    continue
                for start in range(0, len(rows), CHUNK):
                    chunk = range(start, min(start + CHUNK, len(rows)))
                    pending.append((number, self._begin(rows, chunk, pool)))
                    if len(pending) > 1:  # one chunk is being tokenised while the next is read
                        self._finish(*pending.popleft(), kept, labels)
            for number, begun in pending:
                self._finish(number, begun, kept, labels)
        samples = _samples(opened, kept)
        if self.problem:
            with self.whole():
                samples = self._with_targets(samples, labels)
        if not self.every_fault:
            refuse_too_many(self.prepared)
        return samples

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is wrong with a source, or with all rows together, is an error, or one of every fault."""
        try:
            yield
        except DataError as error:
            if not self.every_fault:
                raise
            said, _, remedy = str(error).partition("\n  ")
            where, _, found = said.partition(": ")
            self.prepared.rejects.append(SampleError(where, found, remedy))

    def _open(self, sources: list[SourceRecipe]) -> list[tuple[SourceRecipe, Rows]]:
        """The sources and those that they list; where files share a name, a row's place has the path that was given."""
        specs: list[SourceRecipe] = []
        opened = []
        for source in sources:
            with self.whole():
                specs += _specs(source, self.task)
        for spec in specs:
            with self.whole():
                if are_shards(spec.path):
                    opened += self._open_shards(spec)
                else:
                    opened.append((spec, open_source(spec, self.task, self.data.outside, self.data.urls)))
        names = Counter(rows.name for _, rows in opened)
        for spec, rows in opened:
            if names[rows.name] > 1 or rows.name in self.named:
                rows.name = spec.path
        self.named |= names.keys()
        return opened

    def _open_shards(self, spec: SourceRecipe) -> list[tuple[SourceRecipe, Rows]]:
        opened, notices = open_shards(spec, self.task, self.encoder, self.data.cache_size)
        self.prepared.notices.update(notices)
        return opened

    @property
    def problem(self) -> Problem | None:
        if self.prepared.labels:
            return self.prepared.labels.problem
        return self.head.problem if self.head else None

    def _with_targets(self, samples: Samples, labels: list[RowLabels]) -> Samples:
        """The samples whose labels are all those there are; what these are, the first sources read decide."""
        assert self.problem
        first = first_named(labels)
        if self.prepared.labels is None:
            self.prepared.labels = name_labels(self.problem, self.head.labels if self.head else None, labels)
        kept, targets = [], []
        for at, row in enumerate(labels):
            try:
                targets.append(self.prepared.labels.target(row, first))
                kept.append(at)
            except SampleError as error:
                self._reject(error)
        return replace(samples.take(np.array(kept, dtype=np.int64)), targets=np.array(targets))

    def _begin(self, rows: Rows, chunk: range, pool: Executor) -> _Chunk:
        samples = [(i, *found) for i in chunk if (found := self._parse(rows, i)) is not None]
        contents = [content_of(sample) for _, sample, _ in samples]
        lengths = [self.cache.get(content.key) if content else None for content in contents]
        unknown = [at for at, length in enumerate(lengths) if length is None]
        measured = self.encoder.begin_measure([samples[at][1] for at in unknown], pool)
        return _Chunk(samples, contents, lengths, unknown, measured)

    def _finish(self, source: int, chunk: _Chunk, kept: array[int], labels: list[RowLabels]) -> None:
        """Add a chunk's rows that can be trained on: source, row, tokens, patches, images, digest; and their labels."""
        for at, measured in zip(chunk.unknown, chunk.measured(), strict=True):
            if isinstance(measured, SampleError):
                self._reject(measured)
            else:
                chunk.lengths[at] = measured
                if content := chunk.contents[at]:
                    self.cache.put(content.key, measured)
        for (i, sample, of_row), content, length in zip(chunk.samples, chunk.contents, chunk.lengths, strict=True):
            if length is not None and self._fits(sample, length):
                self.prepared.notices.update(sample.notices)
                self.prepared.notices.update(self.encoder.frames.notices(sample, length))
                digest = content.digest if content else 0  # a file that came while it was looked for
                kept.extend((source, i, length.tokens, length.patches, length.images, digest))
                if of_row is not None:
                    labels.append(of_row)

    def _take(self, source: int, rows: ShardRows, kept: array[int], labels: list[RowLabels]) -> None:
        """Add the rows of shards, as `_finish`; none of them is read."""
        names = ("tokens", "patches", "images", "digest")
        table = np.column_stack([np.full(len(rows), source), np.arange(len(rows)), *map(rows.of, names)])
        fits = (table[:, 2] <= self.packing.max_length) & (table[:, 3] <= (self.packing.max_patches or np.inf))
        for i in np.flatnonzero(~fits).tolist():
            self._fits(rows.stub(i), Measured(*table[i, 2:5].tolist()))
        if problem := self.problem:
            for i in np.flatnonzero(fits).tolist():
                try:
                    labels.append(read_labels(rows.stub(i), problem))
                except SampleError as error:
                    self._reject(error)
                    fits[i] = False
        kept.frombytes(table[fits].astype(np.int64).tobytes())

    def _parse(self, rows: Rows, i: int) -> tuple[Sample, RowLabels | None] | None:
        try:
            sample = rows.sample(i)
            return sample, read_labels(sample, self.problem) if self.problem else None
        except SampleError as error:
            self._reject(error)
            return None

    def _reject(self, error: SampleError) -> None:
        if self.data.on_bad_row == "error" and not self.every_fault:
            raise error
        self.prepared.rejects.append(error)

    def _fits(self, sample: Sample, length: Measured) -> bool:
        error = too_large(sample, length, self.packing)
        if error is None:
            return True
        if self.data.oversize == "drop":
            self.prepared.oversize += 1
        elif self.every_fault:
            self.prepared.rejects.append(error)
        else:
            raise error
        return False


def _specs(source: SourceRecipe, task: Task) -> list[SourceRecipe]:
    """A source itself, or those that an upstream data_config.yaml lists."""
    if not source.path.endswith((".yaml", ".yml")):
        return [source]
    if beside := sorted(source.model_fields_set - {"path", "weight"}):
        raise DataError(
            f"{source.path}: {', '.join(beside)} beside a list of sources\n  Write it into the list's entries."
        )
    try:
        listed = [SourceRecipe(**settings) for settings in expand(source.path, task)]
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{first['loc'][0]}: {first['msg'].lower()}, found {first['input']!r}"
        raise DataError(f"{source.path}: {found}\n  Mend the entry.") from None
    return [each.model_copy(update={"weight": each.weight * source.weight}) for each in listed]
