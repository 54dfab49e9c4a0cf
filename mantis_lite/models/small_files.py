"""A checkpoint's small files, read as data: what in them names code, kernels or files elsewhere is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RecipeError, one_line

MAX_BYTES = 20_000_000
"""Of a file of settings or of the places of weights, which have some 100,000; the vocabulary is not read here."""
KERNELS = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm", "batched_mm"}
"""What a checkpoint may say of attention and experts, all of it transformers' own; what runs is the recipe's choice."""
CHOICES = re.compile(r"_?(attn|experts)_implementation(_internal)?")
"""The keys that say it."""
COPIED = (".json", ".jinja", ".model", ".txt")
"""Files that are copied beside what was trained."""
AS_PUBLISHED = "Take the checkpoint as it was published."


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError and ValueError."""
    if not file.is_file():  # a pipe has no end
        raise FileNotFoundError("no such file")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        found = json.loads(file.read_bytes())
    except RecursionError:
        raise ValueError("lists or objects nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is a {type(found).__name__}, and no object")
    return found


def unreadable(what: str | Path, error: Exception) -> RecipeError:
    """What to say of a part of a checkpoint that cannot be read."""
    return RecipeError(f"model: {what} cannot be read: {one_line(error)}\n  {AS_PUBLISHED}")


def read_small(file: Path) -> dict[str, Any]:
    """The object in one of a checkpoint's JSON files. Raises RecipeError."""
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from None


def refuse_hostile(folder: Path) -> None:
    """Look at all small files of a checkpoint before another library reads any. Raises RecipeError."""
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(".safetensors.index.json"):
            _refuse_weights(file, read_small(file))
        elif "config" in file.name:
            refuse_settings(file, read_small(file))
    if (folder / "adapter_config.json").exists():
        raise RecipeError(
            f"model: {folder} holds an adapter, beside a model or alone\n"
            "  Set model to its base alone, and model.adapter to the adapter."
        )
    for file in folder.iterdir():
        if file.suffix in COPIED and file.is_symlink() and not _is_kept(file):
            raise RecipeError(f"model: {file}: is a link out of the checkpoint\n  Put the file itself there.")


def refuse_settings(file: Path, settings: dict[str, Any]) -> None:
    """Refuse settings that name code, kernels or files elsewhere, however deep. Raises RecipeError."""
    for key, value in _all_of(settings):
        if key == "auto_map" and value:
            raise RecipeError(
                f"model: {file}: auto_map: the checkpoint brings code of its own, and none is ever run\n"
                "  Take one that transformers has the code for; if it has, take auto_map out of the file."
            )
        if CHOICES.fullmatch(key):
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and (not isinstance(name, str) or name not in KERNELS):
                    raise RecipeError(
                        f"model: {file}: {key} is {str(name)[:80]!r}, and no kernel is loaded that a checkpoint names\n"
                        "  Take it out of the file: memory.attention is what chooses."
                    )
        if key == "transformers_weights" and not _is_plain(value):
            raise RecipeError(f"model: {file}: {key} is {value!r}, and no file of weights\n  {AS_PUBLISHED}")
        if key.endswith("_file") and isinstance(value, str) and _leads_elsewhere(file.parent, value):
            raise RecipeError(
                f"model: {file}: {key} is {value[:80]!r}, a file of this machine that is not the checkpoint's\n"
                "  Take it out of the file."
            )


def _refuse_weights(file: Path, index: dict[str, Any]) -> None:
    """The weights' files lie beside their index, whatever it calls them."""
    places = index.get("weight_map")
    if not isinstance(places, dict):
        raise RecipeError(f"model: {file}: has no weight_map\n  {AS_PUBLISHED}")
    for name in places.values():
        if not _is_plain(name) or ((beside := file.parent / name).exists() and not beside.is_file()):
            raise RecipeError(
                f"model: {file}: weight_map has {str(name)[:80]!r}, and no file of weights\n  {AS_PUBLISHED}"
            )


def _all_of(settings: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield key, value
            yield from _all_of(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _all_of(value)


def _is_plain(name: Any) -> bool:
    """Whether it is the name of a file of weights, and no path."""
    return isinstance(name, str) and name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\")


def _leads_elsewhere(folder: Path, name: str) -> bool:
    """Whether a name is that of a file here, which transformers would open; a path of where it was saved is not."""
    if "\0" in name or not os.path.exists(name):
        return False
    return not Path(os.path.realpath(name)).is_relative_to(os.path.realpath(folder))


def _is_kept(file: Path) -> bool:
    """Whether a link leads to a file beside it, or into the hub's cache, which holds files by their hash."""
    real = Path(os.path.realpath(file))
    folder = Path(os.path.realpath(file.parent))
    return any(real.is_relative_to(place) for place in (folder, folder.parent.parent / "blobs"))
