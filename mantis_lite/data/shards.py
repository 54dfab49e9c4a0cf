"""Shards: rows that were measured and written out when they were prepared, read from a folder or a URL."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq

from ..errors import DataError, SampleError
from ..recipe import SourceRecipe, Task
from .encode import Encoder
from .lengths import cache_dir
from .place import Place, is_url
from .sample import Sample
from .shard_cache import File, ShardCache
from .shard_file import Damaged, Spot, read_parquet, read_tar
from .source import Rows

FORMAT = 1
MANIFEST = "shards.json"
INDEX = "index.parquet"
PLAN = "plan.json"
"""What is written first, and taken away when all shards are there."""


def are_shards(path: str) -> bool:
    """Whether a source is a set of shards, or is to become one."""
    place = Place(path)
    return is_url(path) if place.folder is None else any((place.folder / name).is_file() for name in (MANIFEST, PLAN))


@dataclass(frozen=True)
class Shards:
    """A set of shards by its manifest, and the columns (N,) that were asked for of its index, rows in their order."""

    place: Place
    manifest: dict[str, Any]
    cache: ShardCache
    _columns: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def files(self) -> list[File]:
        return [File(of["name"], of["bytes"], of["sha256"]) for of in self.manifest["shards"]]

    @property
    def fetched(self) -> bool:
        """Whether shards come from elsewhere."""
        return self.place.folder is None

    def column(self, name: str) -> np.ndarray:
        """A column of the index. Raises DataError."""
        if name not in self._columns:
            with self._open(File(**self.manifest["index"])) as file:
                self._columns[name] = pq.read_table(file, columns=[name])[name].to_numpy()
        return self._columns[name]

    def sample(self, row: int) -> Sample:
        """Read a row. Raises SampleError for one that is damaged, DataError."""
        shard = self.files[self.column("shard")[row]]
        spot = Spot(*(int(self.column(name)[row]) for name in Spot._fields))
        read = read_parquet if shard.name.endswith(".parquet") else read_tar
        try:
            with self._open(shard) as file:
                return read(file, spot, self.manifest["encoder"]["fingerprint"])
        except Damaged:
            where = self.column("where")[row]
            found = f"its bytes in {self.place.url}/{shard.name} are not as they were written"
            raise SampleError(where, found, "Copy that file again, or prepare the shards again.") from None

    def fetch(self, window: int, windows: int) -> None:
        """Bring the shards of a window here. Raises DataError."""
        for number, file in enumerate(self.files):
            if self.window(np.array(number), windows) == window:
                self.cache.fetch(self.place, file)

    def window(self, shards: np.ndarray, windows: int) -> np.ndarray:
        """In which of so many windows shards are, by their numbers: a stretch of them in each."""
        return shards * windows // len(self.files)

    def bytes_of_windows(self, windows: int) -> np.ndarray:
        """The bytes of each window (windows,)."""
        sizes = [file.bytes for file in self.files]
        return np.bincount(self.window(np.arange(len(sizes)), windows), sizes, windows)

    def _open(self, file: File) -> BinaryIO:
        if self.place.folder is None:
            return self.cache.open(self.place, file)
        try:
            return (self.place.folder / file.name).open("rb")
        except FileNotFoundError:
            found = f"{self.place.url}: no {file.name}, which its {MANIFEST} names"
            raise DataError(f"{found}\n  Copy it there again, or prepare the shards again.") from None


class ShardRows(Rows):
    """The rows of shards that were of one source."""

    def __init__(self, shards: Shards, name: str) -> None:
        super().__init__(name, None, range(shards.manifest["rows"]))
        self.shards = shards

    def where(self, i: int) -> str:
        """The row's place in the source that the shards were made of."""
        return str(self._at("where", i))

    def sample(self, i: int) -> Sample:
        return self.shards.sample(int(self.selected[i]))

    def of(self, name: str, stretch: range | None = None) -> np.ndarray:
        """A column of the index for these rows (N,), or for a stretch of them."""
        selected = self.selected if stretch is None else self.selected[stretch.start : stretch.stop]
        return self.shards.column(name)[selected]

    def stub(self, i: int) -> Sample:
        """A row without its turns, for what is said of it, and its labels."""
        labels = self._at("labels", i)
        return Sample(self.where(i), self._at("id", i), (), labels=None if labels is None else json.loads(labels))

    def _pictures(self) -> np.ndarray:
        return self.of("images")

    def _at(self, name: str, i: int) -> Any:
        return self.shards.column(name)[self.selected[i]]


def open_shards(
    spec: SourceRecipe, task: Task, encoder: Encoder, cache_size: int
) -> tuple[list[tuple[SourceRecipe, Rows]], dict[str, int]]:
    """Open a set of shards as the sources it was made of, each with its weight; and what was noticed of its rows then.

    Raises DataError, also where they were made for another task or by another encoder.
    """
    place = Place(spec.path.rstrip("/"))
    if given := sorted(spec.model_fields_set & {"name", "split", "revision", "media_dir"}):
        raise DataError(f"{place.url}: {given[0]} has no effect on shards\n  Remove {given[0]}.")
    shards = Shards(place, _manifest(place), ShardCache(cache_dir() / "shards", cache_size))
    _refuse_other(shards, task, encoder)
    _refuse_missing(shards)
    sources = shards.manifest["sources"]
    every = ShardRows(shards, place.url)
    every.select(spec)
    opened: list[tuple[SourceRecipe, Rows]] = []
    for number, source in enumerate(sources):
        selected = every.selected[every.of("source") == number]
        if len(selected):
            rows = ShardRows(shards, place.url if len(sources) == 1 else f"{place.url} ({source['name']})")
            rows.task, rows.spec, rows.selected, rows.dropped = task, spec, selected, {} if opened else every.dropped
            opened.append((spec.model_copy(update={"weight": spec.weight * source["weight"]}), rows))
    return opened, shards.manifest["notices"]


def facts_of(encoder: Encoder) -> dict[str, Any]:
    """What a manifest holds of an encoder: its fingerprint, and of each fact a hash."""
    facts = {key: hashlib.sha256(str(fact).encode()).hexdigest()[:16] for key, fact in encoder.facts.items()}
    return {"fingerprint": encoder.fingerprint, "facts": facts}


def _manifest(place: Place) -> dict[str, Any]:
    text = place.read(MANIFEST)
    if text is None:
        begun = place.read(PLAN) is not None
        found = "shards that are not all written" if begun else f"no {MANIFEST} in it"
        remedy = "Run the `mantis-lite data prepare` again that was begun." if begun else "Give a folder of shards."
        raise DataError(f"{place.url}: {found}\n  {remedy}")
    try:
        manifest = json.loads(text)
        form = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{place.url}/{MANIFEST}: damaged\n  Copy it again, or prepare the shards again.") from None
    if form != FORMAT:
        raise DataError(f"{place.url}: shards of format {form}, and {FORMAT} is read here\n  Prepare them again.")
    return manifest


def _refuse_other(shards: Shards, task: Task, encoder: Encoder) -> None:
    """Raise DataError where shards were made for another task, or by another encoder."""
    made, here = shards.manifest["encoder"], facts_of(encoder)
    changed = [key for key, fact in here["facts"].items() if made["facts"].get(key) != fact]
    if shards.manifest["task"] != task:
        changed = ["task", *changed]
    elif made["fingerprint"] == here["fingerprint"]:
        return
    told = ", ".join(f"{key} {value}" for key, value in shards.manifest["made_by"].items() if value is not None)
    raise DataError(
        f"{shards.place.url}: the shards were made with another {', '.join(changed)}: task {shards.manifest['task']}, "
        f"{told}\n  Set it as it was, or prepare the rows again for this."
    )


def _refuse_missing(shards: Shards) -> None:
    """Raise DataError where files of a folder here are missing or cut short; behind a URL that shows when they come."""
    if shards.fetched:
        return
    found = shards.place.sizes()
    for file in (*shards.files, File(**shards.manifest["index"])):
        if found.get(file.name) != file.bytes:
            there = f"{found[file.name]:,} of its {file.bytes:,} bytes" if file.name in found else "missing"
            remedy = "Copy it there again, or prepare the shards again."
            raise DataError(f"{shards.place.url}: {file.name} is {there}\n  {remedy}")
