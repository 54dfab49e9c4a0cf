"""The files of a checkpoint's weights, and what tells one set of weights from another without reading them all."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from ..errors import RecipeError
from .adapter_config import open_tensors
from .checkpoint import Checkpoint, find_folder
from .small_files import AS_PUBLISHED, read_small

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

SAMPLED = 64
"""Numbers of each tensor that a fingerprint reads, from its beginning: another training moves every one."""


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold a checkpoint's weights, fetched from the hub where they are not here yet.

    Raises RecipeError where one is missing.
    """
    index = checkpoint.folder / INDEX
    names = sorted(set(read_small(index)["weight_map"].values())) if index.is_file() else [SINGLE]
    folder = checkpoint.folder
    if not all((folder / name).is_file() for name in names) and not Path(checkpoint.name).is_dir():
        folder = find_folder("model", checkpoint.name, checkpoint.commit, names)
    for name in names:
        if not (folder / name).is_file():
            raise RecipeError(f"model: {checkpoint.name} has no {name}\n  {AS_PUBLISHED}")
    return [folder / name for name in names]


def fingerprint(files: Sequence[Path]) -> str:
    """A hash of the name, kind, shape and first numbers of every tensor, however they are spread over files."""
    found = {}
    for file in files:
        with open_tensors(file) as opened:
            for key in opened.keys():
                part = opened.get_slice(key)
                shape, kind = part.get_shape(), part.get_dtype()
                first = part[: SAMPLED if len(shape) == 1 else 1] if shape else opened.get_tensor(key)
                numbers = first.flatten()[:SAMPLED].float().numpy().tobytes()
                found[key] = f"{kind} {shape} {sha256(numbers).hexdigest()}"
    return sha256("\n".join(f"{key} {found[key]}" for key in sorted(found)).encode()).hexdigest()[:32]
