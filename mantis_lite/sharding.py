"""A recipe's data -> shards, written by processes of this machine or by Ray; goes on where it was killed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .data.encode import Encoder
from .data.place import Place
from .data.prepare import Samples, prepare
from .data.shard_file import Layout
from .data.shards import FORMAT, MANIFEST, PLAN, ShardRows
from .engines import Engine, run
from .errors import DataError, SampleError
from .models.assemble import open_model
from .models.head_config import stated_head
from .recipe import Recipe
from .shard_index import finish
from .shard_job import Job, job_of, rows_per_shard, spec_of, write_shard

Watch = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Sharded:
    """A set of shards that is whole: its manifest, and those of its rows that were rejected."""

    place: Place
    manifest: dict[str, Any]
    rejects: list[SampleError]


def shard(
    recipe: Recipe,
    to: str,
    engine: Engine = "plain",
    layout: Layout = "webdataset",
    shard_size: int = 512 * 10**6,
    workers: int = 1,
    watch: Watch = lambda found, total: found,
) -> Sharded:
    """Write the rows that a recipe trains on as shards of about `shard_size` bytes, in a folder or behind a URL.

    They come in a seeded random order, so that any of them is a fair sample. What is held out of training is left to
    the recipe that trains on them: data.eval is not read. The same rows make the same bytes with any engine. Of a
    process that was killed the shards stay, and the others are written. Raises RecipeError, DataError, SampleError,
    FitError.
    """
    checkpoint = open_model(recipe.model)
    encoder = checkpoint.encoder(recipe)
    data = recipe.data.model_copy(update={"eval": None})
    head = stated_head(checkpoint, recipe)
    prepared = prepare(data, recipe.packing, encoder, task=recipe.task, head=head)
    if any(isinstance(rows, ShardRows) for rows in prepared.train.rows):
        raise DataError("data: shards are made of rows, and not of other shards\n  Name the rows they were made of.")
    order = np.random.default_rng(recipe.packing.seed).permutation(len(prepared.train))
    prepared.train = prepared.train.take(order)
    place = Place(to.rstrip("/"))
    key = _key(recipe, encoder, prepared.train, layout, shard_size)
    if (manifest := _begun(place, key)) is not None:
        return Sharded(place, manifest, prepared.rejects)
    job = job_of(recipe, prepared.train, place, layout)
    specs = _specs(job, key, prepared.train, shard_size)
    there = place.sizes()
    missing = [spec for spec in specs if job.name(spec["shard"]) not in there]
    for done in watch(run(engine, partial(write_shard, job), missing, workers), len(missing)):
        _refuse(done, recipe)
    manifest = finish(recipe, checkpoint, encoder, prepared, job, len(specs), key)
    return Sharded(place, manifest, prepared.rejects)


def _key(recipe: Recipe, encoder: Encoder, samples: Samples, layout: Layout, shard_size: int) -> str:
    """A hash of all that shards are made from: the rows by what is in them, and not by where they lie."""
    facts = [FORMAT, encoder.fingerprint, recipe.task, recipe.data.on_bad_row, samples.weights, layout, shard_size]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for part in (samples.source, samples.row, samples.lengths, samples.digest):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _begun(place: Place, key: str) -> dict[str, Any] | None:
    """The manifest of shards that are all written; None where they are to be. Raises DataError for others."""
    for name in (MANIFEST, PLAN):
        if (text := place.read(name)) is not None:
            found = json.loads(text)
            if found["key"] != key:
                what = "shards of other rows or settings" if name == MANIFEST else "a part of other shards"
                raise DataError(f"--to: {place.url} holds {what}\n  Name another folder, or remove what is in it.")
            return found if name == MANIFEST else None
    if place.sizes():
        raise DataError(f"--to: {place.url} has other files in it\n  Name a folder that is empty, or new.")
    return None


def _specs(job: Job, key: str, samples: Samples, shard_size: int) -> list[dict[str, Any]]:
    """Each shard's rows: as many in each, since any rows are as large as any others where they come by chance."""
    place = Place(job.to)
    known = place.read(PLAN)
    each = json.loads(known)["rows_per_shard"] if known else rows_per_shard(job, samples, shard_size)
    if not known:
        place.write(PLAN, json.dumps({"key": key, "rows_per_shard": each}).encode())
    stretches = (np.arange(shard * each, (shard + 1) * each) for shard in range(math.ceil(len(samples) / each)))
    return [spec_of(samples, shard, of[of < len(samples)]) for shard, of in enumerate(stretches)]


def _refuse(done: dict[str, Any], recipe: Recipe) -> None:
    """Raise what stopped a shard from being written."""
    if done["failed"]:
        raise DataError(done["failed"])
    if done["bad"] and recipe.data.on_bad_row == "error":
        raise SampleError(*done["bad"][0])
