"""What `check` says of a recipe, remembered while everything that it read is as it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..data.lengths import cache_dir
from ..files import write_whole
from ..recipe import Recipe

if TYPE_CHECKING:  # what they stand on takes seconds to load
    from ..data.prepare import Prepared
    from .check import Check, Outlook

LIBRARIES = ("mantis-lite", "transformers", "tokenizers", "numpy", "pillow", "av")
"""Of which another version might say something else."""

MOST_FILES = 200_000
"""Of more files nothing is remembered: to look at all of them takes seconds."""

Seen = tuple[str, int, int]
"""A file: its path, its size in bytes and when it was changed, in ns."""


class Stretch(NamedTuple):
    """A run of a prompt's tokens, as text; a picture's placeholders are shown as one mark."""

    text: str
    trained: bool
    is_picture: bool = False


@dataclass(frozen=True)
class Said:
    """Lines on the rows and packs, and one sample as the model gets it, where any is left to train on."""

    notice: str | None
    rows: list[str]
    packs: list[str]
    sample: str | None
    rendered: list[Stretch]
    on: str
    """When it was found."""


def said_of(found: Check) -> Said:
    """What there is to say of a check, but for what it rejects."""
    outlook = found.outlook
    return Said(
        notice=found.notice,
        rows=rows_said(found.prepared),
        packs=_packs(outlook) if outlook else [],
        sample=_sample(outlook) if outlook else None,
        rendered=outlook.rendered if outlook else [],
        on=time.strftime("%Y-%m-%d %H:%M"),
    )


def rows_said(prepared: Prepared, purpose: str = "to train on") -> list[str]:
    """How many rows were read, and what became of them."""
    parts = [f"{prepared.rows_read:,} rows read", f"{len(prepared.train):,} {purpose}"]
    if prepared.held_out is not None:
        parts.append(f"{len(prepared.held_out):,} held out")
    parts.append(f"{len(prepared.rejects):,} rejected")
    parts.append(f"{prepared.oversize:,} dropped as larger than a pack")
    lines = [", ".join(parts)]
    lines += [f"  notice, {count:,} times: {notice}" for notice, count in prepared.notices.items()]
    if prepared.labels is not None:
        from ..data.labels import some

        lines.append(f"labels, {prepared.labels.problem}: {some(prepared.labels.names)}")
    return lines


def _packs(found: Outlook) -> list[str]:
    plan = found.schedule
    first = plan.packs[: found.packs]
    size = len(first.samples) / len(first)
    lines = [
        f"tokens a sample: {_spread(found.tokens)}; images: {_spread(found.images)}",
        f"packs an epoch: {found.packs:,}, {found.fill:.1%} full, {size:.1f} samples each",
        f"steps an epoch: {found.steps_per_epoch:,} of {plan.per_step} packs; in all {plan.steps:,}",
    ]
    if kept := found.kept:
        lines.append(
            f"vision cache: {kept.pictures:,} pictures, each used {kept.uses:.1f} times: memory.vision_cache=disk (or "
            f"memory) would compute their features once, and take {kept.size / 1e6:,.1f} MB"
        )
    return lines


def _sample(found: Outlook) -> str:
    if found.target is None:
        return f"{found.sample.where} in template {found.template}, {found.trained_tokens} tokens trained (marked)"
    return f"{found.sample.where} to be scored {found.target}"


def _spread(spread: tuple[int, int, int]) -> str:
    least, median, most = spread
    return f"{least:,} to {most:,}, median {median:,}"


def remember(recipe: Recipe, quick: bool, found: Check, said: Said) -> None:
    """Keep what a check said, where it rejected nothing and read nothing but files of this machine."""
    prepared = found.prepared
    if prepared.rejects or prepared.oversize or not _plain(recipe):
        return
    files = _files(recipe, found)
    if files is None or len(files) > MOST_FILES:
        return
    place = _place(recipe, quick)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps({"said": asdict(said), "files": files}).encode(), synced=False)
    except OSError:  # nowhere to keep it: it is found again
        return


def remembered(recipe: Recipe, quick: bool) -> Said | None:
    """What was said of the recipe before, if each file that was read has its size and time; else None."""
    if not _plain(recipe):
        return None
    try:
        kept = json.loads(_place(recipe, quick).read_text())
        said, files = kept["said"], kept["files"]
        if any(_seen(path) != (path, size, changed) for path, size, changed in files):
            return None
        return Said(**said | {"rendered": [Stretch(*stretch) for stretch in said["rendered"]]})
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not as it was written
        return None


def _plain(recipe: Recipe) -> bool:
    """Whether a recipe's rows are in files of JSON here, with their pictures in folders, and its model is one."""
    folders = [source.media_dir for source in recipe.data.sources if source.media_dir is not None]
    json_here = all(Path(file).suffix in (".json", ".jsonl") and Path(file).is_file() for file in _rows(recipe))
    return json_here and all(map(os.path.isdir, folders)) and not recipe.data.urls and recipe.model.llm is None


def _rows(recipe: Recipe) -> list[str]:
    """Where a recipe's rows are: the sources, and what is held out, where it is a file."""
    held_out = [recipe.data.eval] if isinstance(recipe.data.eval, str) else []
    return [*(source.path for source in recipe.data.sources), *held_out]


def _files(recipe: Recipe, found: Check) -> list[Seen] | None:
    """All that was read: rows, pictures and clips, the model's small files; None where some of it is in no file."""
    from .decoding import named_files

    folder = found.checkpoint.folder
    paths = {*_rows(recipe), str(folder), *map(str, folder.iterdir())}
    if folder.parent.name == "snapshots":  # of the hub's cache, which may come to mean another commit
        paths |= {str(ref) for ref in (folder.parents[1] / "refs").rglob("*")}
    named = found.files
    if named is None:
        samples = chain(found.prepared.train, found.prepared.held_out or ())
        named = {file for sample in samples for file in named_files(sample)}
    if None in named:
        return None
    seen = [_seen(path) for path in sorted({*paths, *filter(None, named)})]
    return None if None in seen else seen  # type: ignore[return-value]


def _seen(path: str) -> Seen | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return path, found.st_size, found.st_mtime_ns


def _place(recipe: Recipe, quick: bool) -> Path:
    code = max(file.stat().st_mtime_ns for file in _code())
    facts = [recipe.model_dump_json(), quick, os.getcwd(), code, *map(version, LIBRARIES)]
    return cache_dir() / "checks" / f"{sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"


def _code() -> Iterator[Path]:
    """This package's own files: what it says changes with them, and not with its version alone."""
    return Path(__file__).parents[1].rglob("*.py")
