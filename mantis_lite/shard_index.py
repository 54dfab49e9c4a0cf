"""What is known of shards that are all written: their index and, as the last, their manifest."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .data.encode import Encoder
from .data.place import Place
from .data.prepare import Prepared, refuse_too_many
from .data.shard_cache import File
from .data.shards import FORMAT, INDEX, MANIFEST, PLAN, facts_of
from .errors import DataError, SampleError
from .models.checkpoint import Checkpoint
from .recipe import Recipe
from .shard_job import UNFINISHED, Job

VERSIONS = ("mantis-lite", "tokenizers", "numpy", "pillow", "av", "pyarrow")
"""What decides the bytes of a shard."""


def finish(
    recipe: Recipe, checkpoint: Checkpoint, encoder: Encoder, prepared: Prepared, job: Job, shards: int, key: str
) -> dict[str, Any]:
    """Write the index and the manifest of shards, and remove what was only there to go on. Raises DataError.

    `prepared` has the samples in the order of the shards, and is told of those that were rejected there.
    """
    place = Place(job.to)
    there = place.sizes()
    facts = [_facts(place, job.name(shard), there) for shard in range(shards)]
    prepared.rejects += [SampleError(*bad) for of in facts for bad in of["bad"]]
    refuse_too_many(prepared)
    index = _index(prepared, facts)
    manifest = {
        "format": FORMAT,
        "key": key,
        "layout": job.layout,
        "task": recipe.task,
        "encoder": facts_of(encoder),
        "made_by": _made_by(recipe, checkpoint, encoder),
        "versions": {name: version(name) for name in VERSIONS},
        "sources": _sources(prepared, index),
        "labels": list(prepared.labels.names) if prepared.labels else None,
        "rows": len(index),
        "tokens": int(index["tokens"].to_numpy().sum()),
        "bytes": sum(of["file"]["bytes"] for of in facts),
        "rejected": len(prepared.rejects),
        "oversize": prepared.oversize,
        "notices": _notices(prepared, recipe),
        "index": _write_index(place, index)._asdict(),
        "shards": [of["file"] | {"rows": len(of["rows"])} for of in facts],
    }
    place.write(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    for name in (PLAN, *(f"{of['file']['name']}.json" for of in facts)):
        place.remove(name)
    if place.folder:
        _sweep(place.folder)
    return manifest


def _sweep(folder: Path) -> None:
    """Remove what killed processes were writing."""
    for unfinished in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished)
    for unfinished in folder.glob("*.tmp-*"):
        unfinished.unlink()


def _facts(place: Place, name: str, there: dict[str, int]) -> dict[str, Any]:
    """What was written beside a shard. Raises DataError where it, or the shard, is not there as it was written."""
    text = place.read(f"{name}.json")
    facts = json.loads(text) if text else None
    if facts is None or there.get(name) != facts["file"]["bytes"]:
        found = f"{place.url}: {name} is not there as it was written"
        raise DataError(f"{found}\n  Remove it and {name}.json, and run the same command again.")
    return facts


def _index(prepared: Prepared, facts: list[dict[str, Any]]) -> pa.Table:
    """A row for each of the shards' rows, in their order."""
    rows = [row | {"shard": shard} for shard, of in enumerate(facts) for row in of["rows"]]
    samples = prepared.train.take(np.array([row["number"] for row in rows], dtype=np.int64))
    labels = [_ordered(row["labels"], prepared) if prepared.labels else None for row in rows]
    return pa.table(
        {
            "shard": pa.array([row["shard"] for row in rows], pa.int32()),
            "source": pa.array(samples.source, pa.int32()),
            "tokens": pa.array(samples.lengths[:, 0], pa.int32()),
            "patches": pa.array(samples.lengths[:, 1], pa.int32()),
            "images": pa.array(samples.images, pa.int32()),
            "digest": pa.array(samples.digest, pa.int64()),
            "start": pa.array([row["start"] for row in rows], pa.int64()),
            "size": pa.array([row["size"] for row in rows], pa.int64()),
            "crc": pa.array([row["crc"] for row in rows], pa.uint32()),
            "where": pa.array([row["where"] for row in rows], pa.string()),
            "id": pa.array([row["id"] for row in rows], pa.string()),
            "labels": pa.array(labels, pa.string()),
        }
    )


def _ordered(labels: Any, prepared: Prepared) -> str:
    """A row's labels as JSON; those by name in the order of the scores, which the first row that is read decides."""
    if prepared.labels and isinstance(labels, dict):
        known = [name for name in prepared.labels.names if name in labels]
        labels = {name: labels[name] for name in dict.fromkeys([*known, *labels])}
    return json.dumps(labels)


def _write_index(place: Place, index: pa.Table) -> File:
    content = io.BytesIO()
    pq.write_table(index, content, compression="zstd")
    place.write(INDEX, content.getvalue())
    return File(INDEX, content.tell(), hashlib.sha256(content.getvalue()).hexdigest())


def _made_by(recipe: Recipe, checkpoint: Checkpoint, encoder: Encoder) -> dict[str, Any]:
    """The settings that decide ids and pictures, for people; by the encoder's facts shards are compared."""
    media = recipe.media.model_dump(mode="json", exclude_defaults=True)
    return {
        "model": checkpoint.public_name,
        "model.revision": checkpoint.commit,
        "prompt.template": encoder.template.name,
        "prompt.system": recipe.prompt.system,
        "packing.max_length": recipe.packing.max_length,
        **{f"media.{key}": value for key, value in media.items()},
    }


def _sources(prepared: Prepared, index: pa.Table) -> list[dict[str, Any]]:
    samples = prepared.train
    rows = np.bincount(index["source"].to_numpy(), minlength=len(samples.rows)).tolist()
    named = zip(samples.rows, samples.weights, rows, strict=True)
    return [{"name": of.name, "weight": weight, "rows": count} for of, weight, count in named]


def _notices(prepared: Prepared, recipe: Recipe) -> dict[str, int]:
    """What is told where shards are trained on, and how often it was so of their rows."""
    notices = Counter(prepared.notices)
    if prepared.rejects:
        notices["a row was rejected when the shards were made"] = len(prepared.rejects)
    if prepared.oversize:
        found = f"a row was left out of the shards as larger than packing.max_length={recipe.packing.max_length}"
        notices[found] = prepared.oversize
    return dict(sorted(notices.items()))
