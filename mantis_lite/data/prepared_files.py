"""What `prepare` found, as a folder of arrays that other processes map; they parse no row."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, FitError, SampleError
from ..recipe import DataRecipe, HeadRecipe, PackingRecipe, SourceRecipe, Task
from .chunks import KEPT
from .columns import Fault
from .encode import Encoder
from .labels import Labels
from .lines import Lines
from .prepare import Prepared, Samples, hash_of
from .shards import ShardRows, Shards, open_shards
from .source import Rows, open_whole

FACTS = "facts.json"
"""All that is no array."""


def save_prepared(prepared: Prepared, folder: Path) -> None:
    """Write what was prepared into a folder, in place of what was there; it is whole or absent. Raises OSError."""
    for part in folder.parent.glob(f"{folder.name}.tmp-*"):  # of one that was killed here
        shutil.rmtree(part)
    part, before = (folder.with_name(f"{folder.name}.tmp-{name}") for name in ("new", "old"))
    part.mkdir(parents=True)
    parts = {"train": prepared.train} | ({"held_out": prepared.held_out} if prepared.held_out is not None else {})
    sources = list({id(rows): rows for samples in parts.values() for rows in samples.rows}.values())
    facts = {
        "made_by": prepared.made_by,
        "sources": [_save_rows(rows, part / f"source-{at}") for at, rows in enumerate(sources)],
        "parts": {name: _save_samples(samples, sources, part / name) for name, samples in parts.items()},
        "rejects": [
            [isinstance(reject, FitError), reject.where, reject.found, reject.remedy, reject.sample_id]
            for reject in prepared.rejects
        ],
        "notices": prepared.notices,
        "rows_read": prepared.rows_read,
        "oversize": prepared.oversize,
        "labels": prepared.labels and [prepared.labels.problem, prepared.labels.names],
    }
    (part / FACTS).write_text(json.dumps(facts))
    if folder.exists():
        os.rename(folder, before)
    os.rename(part, folder)
    shutil.rmtree(before, ignore_errors=True)


def open_prepared(
    folder: Path,
    data: DataRecipe,
    packing: PackingRecipe,
    encoder: Encoder,
    seed: int = 42,
    task: Task = "chat",
    head: HeadRecipe | None = None,
) -> Prepared:
    """What `prepare` of these arguments returned where it was saved; its arrays are mapped, and pickled as their names.

    Raises DataError where a source has changed since.
    """
    facts = json.loads((folder / FACTS).read_text())
    assert facts["made_by"] == hash_of(data, packing, encoder, seed, task, head), "prepared for another recipe"
    sets: dict[str, Shards] = {}
    sources: list[Rows] = []
    for at, kept in enumerate(facts["sources"]):
        if kept["shards"]:
            sources.append(_open_shard_rows(kept, folder / f"source-{at}", sets, encoder, data.cache_size))
        else:
            sources.append(_open_rows(kept, folder / f"source-{at}"))
    parts = {name: _open_samples(kept, sources, folder / name) for name, kept in facts["parts"].items()}
    return Prepared(
        train=parts["train"],
        held_out=parts.get("held_out"),
        rejects=[(FitError if large else SampleError)(*words) for large, *words in facts["rejects"]],
        notices=Counter(facts["notices"]),
        rows_read=facts["rows_read"],
        oversize=facts["oversize"],
        labels=facts["labels"] and Labels(facts["labels"][0], tuple(facts["labels"][1])),
        made_by=facts["made_by"],
    )


def _save_rows(rows: Rows, folder: Path) -> dict[str, Any]:
    arrays = {"selected": rows.selected, "numbers": rows.numbers}
    kept: dict[str, Any] = {
        "spec": rows.spec.model_dump(mode="json"),
        "name": rows.name,
        "task": rows.task,
        "outside": rows.media.outside,
        "urls": rows.media.urls,
        "dropped": rows.dropped,
        "shards": isinstance(rows, ShardRows),
        "files": [] if isinstance(rows, ShardRows) else _stamps(rows.spec),
    }
    if rows.lines is not None:
        state = rows.lines.__getstate__()
        arrays["places"], kept["written"] = state["places"], state["written"]
    _save_arrays(arrays, folder)
    return kept


def _open_rows(kept: dict[str, Any], folder: Path) -> Rows:
    """The rows of a source, opened again without looking for them. Raises DataError where it has changed."""
    spec = SourceRecipe(**kept["spec"])
    arrays = _open_arrays(folder)
    lines = None
    if "written" in kept:
        try:
            lines = Lines.again(Path(spec.path), tuple(kept["written"]), arrays["places"])
        except Fault as fault:
            raise DataError(f"{spec.path}: {fault.found}\n  {fault.remedy}") from None
    rows = open_whole(spec, kept["task"], kept["outside"], kept["urls"], lines)
    if _stamps(spec) != kept["files"] or len(rows) != len(arrays["numbers"]):
        raise DataError(f"{spec.path}: has changed since it was read\n  Start again, and let it be until the end.")
    rows.name, rows.dropped = kept["name"], kept["dropped"]
    rows.selected, rows.numbers = arrays["selected"], arrays["numbers"]
    return rows


def _open_shard_rows(
    kept: dict[str, Any], folder: Path, sets: dict[str, Shards], encoder: Encoder, cache_size: int
) -> ShardRows:
    """The rows that shards have of a source; `sets` are those that are open already. Raises DataError."""
    spec = SourceRecipe(**kept["spec"])
    if spec.path not in sets:
        ((_, first), *_), _ = open_shards(spec, kept["task"], encoder, cache_size)
        assert isinstance(first, ShardRows)
        sets[spec.path] = first.shards
    rows = ShardRows(sets[spec.path], kept["name"])
    rows.task, rows.spec, rows.dropped = kept["task"], spec, kept["dropped"]
    rows.selected = _open_arrays(folder)["selected"]
    return rows


def _stamps(spec: SourceRecipe) -> list[list[Any]]:
    """The files of a source that lies here, each with its size and time; none of one on the Hub."""
    path = Path(spec.path)
    files: Iterable[Path] = [path]
    if not path.is_file():
        files = sorted(file for pattern in ("*.parquet", "*.arrow", "*/*.arrow") for file in path.glob(pattern))
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _save_samples(samples: Samples, sources: list[Rows], folder: Path) -> dict[str, Any]:
    names = [*(KEPT.fields or ()), *(["targets"] if samples.targets is not None else [])]
    _save_arrays({name: getattr(samples, name) for name in names}, folder)
    at = {id(rows): number for number, rows in enumerate(sources)}
    return {"sources": [at[id(rows)] for rows in samples.rows], "weights": samples.weights}


def _open_samples(kept: dict[str, Any], sources: list[Rows], folder: Path) -> Samples:
    return Samples([sources[at] for at in kept["sources"]], kept["weights"], **_open_arrays(folder))


def _save_arrays(arrays: dict[str, np.ndarray], folder: Path) -> None:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _open_arrays(folder: Path) -> dict[str, np.ndarray]:
    return {file.stem: open_array(file) for file in folder.glob("*.npy")}


class Mapped(np.memmap):
    """The array of a .npy file, mapped. The pickle of all of it is the file's name; that of a part is its numbers."""

    def __reduce__(self):
        if isinstance(self.base, mmap.mmap):
            return open_array, (Path(self.filename),)
        return np.array(self).__reduce__()


def open_array(file: Path) -> np.ndarray:
    """The array of a .npy file, mapped to be read."""
    with file.open("rb") as opened:
        np.lib.format.read_magic(opened)
        shape, column_major, dtype = np.lib.format.read_array_header_1_0(opened)
        assert not column_major, file
        return Mapped(file, dtype, "r", opened.tell(), shape)
