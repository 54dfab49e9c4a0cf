"""One shard: rows of a recipe's sources -> its file, a function of plain values that any process can run."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .data.encode import Encoder
from .data.media import size as seen_size
from .data.media import stream
from .data.place import Place
from .data.prepare import Samples
from .data.sample import Frame, Image, Sample, Turn
from .data.shard_cache import File
from .data.shard_file import SUFFIX, Layout, write_parquet, write_tar
from .data.source import Rows, open_source
from .errors import MantisError, SampleError
from .models.assemble import open_model
from .recipe import Recipe, SourceRecipe

PROBED = 64
"""Rows that are written to see how large a row is."""

UNFINISHED = ".writing-"
"""What the folder of a shard that is being written is called."""

COLUMNS = ("number", "source", "position", "tokens")
"""What is known of each row of a shard before it is read: its number among all, its source and place there."""


@dataclass(frozen=True)
class Job:
    """What a process must know to write any shard: plain values, so that any engine can send it.

    `sources` are those of the rows, the names they go by and their settings as JSON.
    """

    recipe: str
    sources: tuple[tuple[str, str], ...]
    to: str
    layout: Layout

    def name(self, shard: int) -> str:
        return f"{shard:06d}{SUFFIX[self.layout]}"


def job_of(recipe: Recipe, samples: Samples, place: Place, layout: Layout) -> Job:
    """The job of writing these samples, which are of the recipe's sources, as shards."""
    every = {"max_size": None, "shuffle": False, "max_num_images": None, "vl_only": False}
    sources = []
    for rows in samples.rows:
        found = {"path": _anywhere(rows.spec.path), "media_dir": rows.spec.media_dir and _anywhere(rows.spec.media_dir)}
        sources.append((rows.name, rows.spec.model_copy(update=every | found).model_dump_json()))
    names = {key: getattr(recipe.model, key) for key in ("name", "llm", "vision")}
    model = recipe.model.model_copy(update={key: _anywhere(name) for key, name in names.items() if name})
    to = place.url if place.folder is None else str(place.folder.absolute())
    return Job(recipe.model_copy(update={"model": model}).model_dump_json(), tuple(sources), to, layout)


def _anywhere(path: str) -> str:
    """What leads to a file or folder here from any working directory; a name on the hub as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def spec_of(samples: Samples, shard: int, numbers: np.ndarray) -> dict[str, Any]:
    """What is to be in a shard: the samples of these numbers, by where they stand in their sources."""
    sources = samples.source[numbers].tolist()
    rows = samples.row[numbers].tolist()
    return {
        "shard": shard,
        "number": numbers.tolist(),
        "source": sources,
        "position": [int(samples.rows[source].selected[row]) for source, row in zip(sources, rows, strict=True)],
        "tokens": samples.lengths[numbers, 0].tolist(),
    }


def write_shard(job: Job, spec: dict[str, Any]) -> dict[str, Any]:
    """Write one shard, and beside it what is known of its rows: a function of its arguments alone.

    Returns what was wrong: `bad` rows, each as the arguments of a SampleError, or why the shard could not be written.
    """
    place, name = Place(job.to), job.name(spec["shard"])
    try:
        recipe, encoder, sources = _opened(job)
        with TemporaryDirectory(prefix=UNFINISHED, dir=place.folder) as folder:
            file = Path(folder) / name
            facts = _write(file, job, spec, encoder, sources)
            if not facts["bad"] or recipe.data.on_bad_row == "skip":
                place.write(f"{name}.json", json.dumps(facts).encode())
                place.put(file, name)
    except (MantisError, OSError) as error:
        return {"bad": [], "failed": str(error)}
    return {"bad": facts["bad"], "failed": None}


def _write(file: Path, job: Job, spec: dict[str, Any], encoder: Encoder, sources: list[Rows]) -> dict[str, Any]:
    """The facts of a shard: its bytes, and of each row its number among all, place, name and labels."""
    rows: list[dict[str, Any]] = []
    bad: list[tuple[str, str, str, str | None]] = []

    def samples() -> Iterator[tuple[str, Sample]]:
        for number, source, position, tokens in zip(*(spec[name] for name in COLUMNS), strict=True):
            rows_of = sources[source]
            rows_of.selected = np.array([position])
            try:
                sample = rows_of.sample(0)
                written = _written(sample, encoder, tokens)
            except SampleError as error:
                bad.append((error.where, error.found, error.remedy, error.sample_id))
                continue
            labels = None if encoder.score is None else sample.labels
            rows.append({"number": number, "where": sample.where, "id": sample.id, "labels": labels})
            yield f"{number:09d}", written

    write = write_tar if job.layout == "webdataset" else write_parquet
    spots = write(file, samples())
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    rows = [row | spot._asdict() for row, spot in zip(rows, spots, strict=True)]
    return {"file": File(file.name, file.stat().st_size, digest)._asdict(), "rows": rows, "bad": bad}


def _written(sample: Sample, encoder: Encoder, tokens: int) -> Sample:
    """A sample as a shard keeps it: its clips as frames, its pictures as bytes. Raises SampleError."""
    laid_out, pictures, written = encoder.write(sample)
    if len(written.ids) != tokens:
        found = f"it has {len(written.ids):,} tokens, and had {tokens:,} when it was measured"
        raise SampleError(sample.where, found, "Let the files be until the end, and start again.", sample.id)
    seen = iter(pictures)
    turns = []
    for turn in laid_out.turns:
        content = (_kept(p, next(seen), laid_out, encoder) if isinstance(p, Image) else p for p in turn.content)
        turns.append(Turn(turn.role, tuple(content)))
    return Sample(sample.where, sample.id, tuple(turns), written=written)


def _kept(image: Image, seen: Any, sample: Sample, encoder: Encoder) -> Image:
    """A picture as the bytes of its file; a clip's frame as the model sees it, in WebP without loss."""
    if not isinstance(image, Frame):
        with stream(image.source) as opened:
            return Image(opened.read())
    file = io.BytesIO()
    seen.save(file, "WEBP", lossless=True, quality=0, method=0)  # the quickest
    kept = Image(file.getvalue())
    if seen_size(kept, sample, encoder.max_image_size) != seen.size:  # one that is scaled twice, by a rounding
        found = f"a frame of {seen.width} x {seen.height} pixels would be scaled again when it is read"
        raise SampleError(sample.where, found, "Set another media.max_image_size, or drop the row.", sample.id)
    return kept


@lru_cache(maxsize=1)
def _opened(job: Job) -> tuple[Recipe, Encoder, list[Rows]]:
    """What a process opens once, however many shards it writes."""
    recipe = Recipe.model_validate_json(job.recipe)
    encoder = open_model(recipe.model).encoder(recipe)
    sources = []
    for name, spec in job.sources:
        data = recipe.data
        rows = open_source(SourceRecipe.model_validate_json(spec), recipe.task, data.outside, data.urls)
        rows.name = name
        sources.append(rows)
    return recipe, encoder, sources


def rows_per_shard(job: Job, samples: Samples, shard_size: int) -> int:
    """As many rows as come to this size, by the bytes of the first."""
    _, encoder, sources = _opened(job)
    first = spec_of(samples, 0, np.arange(min(PROBED, len(samples))))
    with TemporaryDirectory() as folder:
        facts = _write(Path(folder) / "probe", job, first, encoder, sources)
    return max(1, round(shard_size * max(1, len(facts["rows"])) / facts["file"]["bytes"]))
