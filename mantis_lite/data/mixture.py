"""What a recipe names as its data -> sources to open: upstream's data_config.yaml, and the subsets of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml.error import YAMLError

from ..errors import DataError, did_you_mean, one_line
from ..recipe import DataRecipe, MediaRecipe, PackingRecipe, SourceRecipe, Task
from ..recipe_file import recipes_dir
from ..secrets import refuse_secrets
from ..yaml_text import load_yaml, read_text
from .repository import renamed
from .subsets import subset_of

SAME = ("path", "name", "split", "revision", "weight", "max_size", "shuffle", "max_num_images", "media_dir", "vl_only")
"""Keys of an entry that a source has too."""
TASKS = {"chat": "chat", "chat_video": "video", "classification": "classify", "qwen2_video_classification": "classify"}
MEDIA = {
    "max_image_size": ("max_image_size",),
    "max_num_frames": ("num_frames", "max_frames"),
    "num_frames": ("num_frames",),
    "fps": ("fps",),
    "sampling": ("sampling",),
}
"""Keys that are set for all sources at once here, in one of these of `media`."""
WITHOUT_EFFECT = {
    "offline_sha": "names a cache of datasets that is not read here",
    "packing_same_mm_media": "packs are planned by length, and no sample of one sees another",
}
READ = (*SAME, "format", "type", "video_dir", "sample_ratio", "max_seq_len", *MEDIA, *WITHOUT_EFFECT)
SCRIPT = "revision: script holds a loading script, which is not run: main is read"


def sources_of(
    source: SourceRecipe, task: Task, media: MediaRecipe | None = None, packing: PackingRecipe | None = None
) -> tuple[list[SourceRecipe], list[str]]:
    """A source itself, or those that it lists; and what of them has no effect, in words.

    It lists some where it is a data_config.yaml, the user's or one that comes with the package, whose keys must not say
    otherwise than `media` and `packing`; or a downloaded dataset, without naming one of its subsets. Raises DataError,
    and RecipeError for a token.
    """
    if not source.path.endswith((".yaml", ".yml")):
        return _subsets(source)
    if not Path(source.path).exists() and (shipped := recipes_dir() / "data" / source.path).is_file():
        source = source.model_copy(update={"path": str(shipped)})
    if beside := sorted(source.model_fields_set - {"path", "weight"}):
        raise DataError(
            f"{source.path}: {', '.join(beside)} beside a list of sources\n  Write it into the list's entries."
        )
    listed, notices = [], list[str]()
    for entry in _entries(source.path, task, media or MediaRecipe(), packing or PackingRecipe()):
        notices += _notices(entry)
        found, more = _subsets(_source(entry, source))
        listed += found
        notices += more
    return listed, notices


def _entries(path: str, task: Task, media: MediaRecipe, packing: PackingRecipe) -> list[dict[str, Any]]:
    try:
        text = read_text(Path(path))
        refuse_secrets(text, path)
        config = load_yaml(text)
    except (OSError, YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}\n  Give a data_config.yaml.") from None
    refuse_secrets(config, path)
    entries = config.get("data") if isinstance(config, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise DataError(f"{path}: no list of sources\n  Write them under `data:`, each with a path and format.")
    problems = [
        f"{path}: data[{at}].{problem}"
        for at, entry in enumerate(entries)
        for problem in (*_problems(entry, task), *_elsewhere(entry, media, packing))
    ]
    if problems:
        raise DataError("\n".join(problems))
    return entries


def _problems(entry: dict[str, Any], task: Task) -> Iterator[str]:
    form, kind, split = entry.get("format"), entry.get("type", "huggingface"), entry.get("split")
    rows = "chat" if task == "pretrain" else task  # captions are rows of chat, which the original writes otherwise
    if TASKS.get(str(form)) != rows:
        here = ", ".join(name for name, of in TASKS.items() if of == rows)
        yield f"format: {form} belongs to task={TASKS.get(str(form), 'none')}; here is read {here}"
    if kind not in ("huggingface", "json", "jsonl"):
        yield f"type: {kind} is not known; write huggingface, json or jsonl"
    if split not in (None, "train"):
        yield f"split: {split} is not trained on; name it in data.eval"
    if not isinstance(entry.get("path"), str):
        yield "path: missing; write the file or the dataset on the Hub"
    if entry.get("sample_ratio") is not None and entry.get("weight") is not None:
        yield "sample_ratio: is the weight, and weight is there too; keep one of them"
    for key in entry:
        if key not in READ:
            yield f"{key}: no such key{did_you_mean(str(key), READ) or '; remove it'}"


def _elsewhere(entry: dict[str, Any], media: MediaRecipe, packing: PackingRecipe) -> Iterator[str]:
    """What is said of one source and holds for all here, where it is not the same."""
    for key, names in MEDIA.items():
        if (value := entry.get(key)) not in (None, False, *(getattr(media, name) for name in names)):
            ways = " or ".join(f"media.{name}={value}" for name in names)
            yield f"{key}: {value} is not read here for one source; set {ways} for all, or remove it"
    longest = entry.get("max_seq_len")
    if longest is not None and (not isinstance(longest, int) or longest < packing.max_length):
        found = f"max_seq_len: {longest} would cut rows shorter than packing.max_length={packing.max_length}"
        yield f"{found}; rows are not cut here: set packing.max_length={longest}, or remove it"


def _notices(entry: dict[str, Any]) -> Iterator[str]:
    """What an entry says that changes nothing here."""
    if entry.get("max_seq_len") is not None:
        yield "max_seq_len: no row is cut; those longer than packing.max_length go by data.oversize"
    for key, reason in WITHOUT_EFFECT.items():
        if entry.get(key):
            yield f"{key}: {reason}"


def _source(entry: dict[str, Any], listing: SourceRecipe) -> SourceRecipe:
    folder = Path(listing.path).parent
    settings = {key: entry[key] for key in SAME if entry.get(key) is not None}
    settings["weight"] = entry["sample_ratio"] if entry.get("sample_ratio") is not None else entry.get("weight", 1.0)
    if entry.get("video_dir") is not None:
        settings["media_dir"] = str(folder / entry["video_dir"])
    if entry.get("type", "huggingface") != "huggingface":
        beside = folder / entry["path"]  # or else in the working directory, as upstream
        path = str(beside) if beside.exists() else entry["path"]
        settings |= {"path": path, "name": None, "split": None, "revision": None}  # of a file these are only labels
    try:
        source = SourceRecipe(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = "sample_ratio" if first["loc"][0] == "weight" and "sample_ratio" in entry else first["loc"][0]
        raise DataError(
            f"{listing.path}: {key}: {first['msg'].lower()}, found {first['input']!r}\n  Mend the entry."
        ) from None
    return source.model_copy(update={"weight": source.weight * listing.weight})


def _subsets(source: SourceRecipe) -> tuple[list[SourceRecipe], list[str]]:
    """A source with its subset by the name it has now; one for each subset here, where a dataset is named alone."""
    notices = []
    if source.revision == "script":
        source = source.model_copy(update={"revision": None})
        notices.append(SCRIPT)
    subset = subset_of(source)
    if subset is None:
        return [source], notices
    path = source.path if Path(source.path).is_dir() else subset.repo
    source = source.model_copy(update={"path": path, "split": subset.split})
    if subset.name is None:
        return [source.model_copy(update={"name": name}) for name in subset.whole] or [source], notices
    (now,), renames = renamed(subset.repo, [subset.name])
    return [source.model_copy(update={"name": now})], notices + renames


def sources_of_all(
    data: DataRecipe, task: Task, media: MediaRecipe | None = None, packing: PackingRecipe | None = None
) -> Iterator[SourceRecipe]:
    """All that a recipe trains on and holds out, but for what cannot be read: who opens it says why."""
    for source in [*data.sources, *([SourceRecipe(path=data.eval)] if isinstance(data.eval, str) else [])]:
        try:
            yield from sources_of(source, task, media, packing)[0]
        except DataError:
            continue
