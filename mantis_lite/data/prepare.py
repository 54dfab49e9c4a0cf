"""A recipe's data -> the samples that can be trained on, with their lengths, and a count of all that cannot."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from ..cycles import no_cycle_collection
from ..errors import DataError, FitError, SampleError
from ..recipe import DataRecipe, HeadRecipe, PackingRecipe, Problem, SourceRecipe, Task
from .chunks import KEPT, Chunks, read_all, workers_for
from .encode import Encoder
from .labels import Labels, RowLabels, first_named, label_notices, name_labels
from .lengths import LengthCache
from .mixing import by_square_root
from .mixture import sources_of
from .sample import Sample
from .shards import ShardRows, are_shards, open_shards
from .source import Rows, open_source
from .subsets import refuse_absent


@dataclass
class Samples(Sequence[Sample]):
    """The accepted samples of all sources, parsed when they are asked for.

    lengths (S, 2), tokens and patches; images (S,), pictures; source (S,) and row (S,) say where each stands: int32,
    in which a length's square has no room. digest (S,) int64, what is in it; weights (sources,). targets (S, L)
    float32, or (S,) int64 classes, where samples have labels to be told.
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

    def called(self, index: int) -> str:
        """What a sample is called in messages: file, row and id."""
        sample = self[index]
        return sample.where if sample.id is None else f'{sample.where} (id "{sample.id}")'

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
    made_by: str = ""
    """A hash of what `prepare` was asked."""


def prepare(
    data: DataRecipe,
    packing: PackingRecipe,
    encoder: Encoder,
    seed: int = 42,
    task: Task = "chat",
    head: HeadRecipe | None = None,
    every_fault: bool = False,
    workers: int | None = None,
) -> Prepared:
    """Read, check and measure every row; opens no picture or clip beyond its header.

    A row that cannot be trained on is an error, or with `on_bad_row=skip` is counted, and more than 1% of them is an
    error all the same. With a `head`, rows have labels: those it states, or all that the rows name. Raises SampleError,
    FitError, DataError; with `every_fault` none of them: `rejects` then has all that is wrong, of rows and of sources.
    `workers` processes read beside this one, by default as many as there are cores where that is sooner.
    """
    made_by = hash_of(data, packing, encoder, seed, task, head)
    prepared = Prepared(train=_samples([], []), held_out=None, made_by=made_by)
    with LengthCache(encoder.fingerprint) as cache, no_cycle_collection():
        reader = _Reader(data, packing, encoder, cache, prepared, task, head, every_fault, workers)
        prepared.train = reader.read(data.sources)
        if isinstance(data.eval, str):
            prepared.held_out = reader.read([SourceRecipe(path=data.eval)])
    if isinstance(data.eval, float):
        order = np.random.default_rng(seed).permutation(len(prepared.train))
        held_out = max(1, round(len(order) * data.eval))
        prepared.held_out = prepared.train.take(np.sort(order[:held_out]))
        prepared.held_out.weights = [1.0] * len(prepared.held_out.weights)  # each is asked once
        prepared.train = prepared.train.take(np.sort(order[held_out:]))
    if data.balance == "sqrt":
        counts = np.bincount(prepared.train.source, minlength=len(prepared.train.rows))
        prepared.train.weights = by_square_root(counts.tolist(), prepared.train.weights)
    if not len(prepared.train) and not every_fault:
        raise DataError(
            f"{data.sources[0].path}: no row is left to train on, of {prepared.rows_read} read\n"
            "  See why with `mantis-lite check`."
        )
    if len(prepared.train) and prepared.labels and prepared.train.targets is not None:
        with reader.whole():
            prepared.notices.update(label_notices(prepared.labels, prepared.train.targets))
    return prepared


def hash_of(
    data: DataRecipe,
    packing: PackingRecipe,
    encoder: Encoder,
    seed: int = 42,
    task: Task = "chat",
    head: HeadRecipe | None = None,
) -> str:
    """What `prepare` is asked, as a hash; not what is in the files."""
    settings = [part and part.model_dump(mode="json") for part in (data, packing, head)]
    return sha256(json.dumps([*settings, encoder.fingerprint, seed, task]).encode()).hexdigest()


def read_rows(
    data: DataRecipe, packing: PackingRecipe, encoder: Encoder, task: Task, labels: Labels | None = None
) -> Prepared:
    """As `prepare`, of rows that are not to be trained on: they need labels only where `labels` says which.

    Raises SampleError, FitError, DataError.
    """
    prepared = Prepared(train=_samples([], []), held_out=None, labels=labels)
    with LengthCache(encoder.fingerprint) as cache, no_cycle_collection():
        prepared.train = _Reader(data, packing, encoder, cache, prepared, task).read(data.sources)
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


def _samples(opened: list[tuple[SourceRecipe, Rows]], kept: Sequence[np.ndarray]) -> Samples:
    table = np.concatenate([np.empty(0, KEPT), *kept])
    rows, weights = [rows for _, rows in opened], [spec.weight for spec, _ in opened]
    return Samples(rows, weights, **{name: np.ascontiguousarray(table[name]) for name in KEPT.fields or ()})


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
    workers: int | None = None
    named: set[str] = field(default_factory=set)

    def read(self, sources: list[SourceRecipe]) -> Samples:
        opened = self._open(sources)
        all_rows = [rows for _, rows in opened]
        for rows in all_rows:
            self.prepared.rows_read += len(rows)
            self.prepared.notices.update(rows.dropped)
        drops = self.data.oversize == "drop"
        chunks = Chunks(all_rows, self.encoder, self.cache, self.packing, drops, self.problem)
        unread = sum(len(rows) for rows in all_rows if not isinstance(rows, ShardRows))
        workers = workers_for(unread) if self.workers is None else self.workers
        kept: list[np.ndarray] = []
        labels: list[RowLabels] = []
        with closing(read_all(chunks, workers)) as found:
            for read in found:
                self.cache.add(read.measured)  # first, so that what a fault ends has been remembered
                for fault in read.faults:
                    self._reject(fault)
                self.prepared.notices.update(read.notices)
                self.prepared.oversize += read.oversize
                kept.append(read.kept)
                labels += read.labels
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
                listed, notices = sources_of(source, self.task, self.encoder.frames.media, self.packing)
                self.prepared.notices.update(notices)
                refuse_absent(listed)
                specs += listed
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
        told = array("d")
        kept = np.zeros(len(labels), dtype=bool)
        for at, row in enumerate(labels):
            try:
                told.extend(self.prepared.labels.target(row, first).flat)
                kept[at] = True
            except SampleError as error:
                self._reject(error)
        targets = np.array(told, np.int64 if self.problem == "single_label" else np.float32)
        if self.problem != "single_label":
            targets = targets.reshape(-1, len(self.prepared.labels.names))
        return replace(samples.take(kept), targets=targets)

    def _reject(self, error: SampleError) -> None:
        skipped = self.data.on_bad_row == "skip" and not isinstance(error, FitError)
        if not (skipped or self.every_fault):
            raise error
        self.prepared.rejects.append(error)
