"""The files of a checkpoint's weights: where they are, opening them, what tells one set from another, writing them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import RecipeError
from .checkpoint import Checkpoint, find_folder
from .small_files import AS_PUBLISHED, read_small

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

KINDS = {
    **{torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
"""What safetensors calls kinds of numbers."""

SAMPLED = 64
"""Numbers of each tensor that a fingerprint reads, from its beginning: another training moves every one."""


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold a checkpoint's weights, fetched from the hub where they are not here yet.

    Raises RecipeError where one is missing.
    """
    return files_of("model", checkpoint.name, checkpoint.commit, checkpoint.folder)


def files_of(key: str, name: str, commit: str | None, folder: Path, remedy: str = AS_PUBLISHED) -> list[Path]:
    """As `weight_files`, of a model whose small files are in `folder`; `key` is the recipe's for it."""
    index = folder / INDEX
    names = sorted(set(read_small(index)["weight_map"].values())) if index.is_file() else [SINGLE]
    if not all((folder / file).is_file() for file in names) and not Path(name).is_dir():
        folder = find_folder(key, name, commit, names)
    for file in names:
        if not (folder / file).is_file():
            raise RecipeError(f"{key}: {name} has no {file}\n  {remedy}")
    return [folder / file for file in names]


def open_tensors(file: Path) -> Any:
    """A file of safetensors, of which nothing is read yet. Raises RecipeError."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{file}: is damaged: {error}\n  Copy it again from where it was trained.") from None


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


def room_for_names(file: Path) -> int:
    """The bytes that a file of safetensors has in front for names and places."""
    with file.open("rb") as opened:
        return struct.unpack("<Q", opened.read(8))[0]


def write_files(folder: Path, files: Iterable[tuple[str, Iterable[tuple[str, Tensor]], int]]) -> None:
    """Write files of weights, each by name, tensors and room for their names; and an index where there are several."""
    places: dict[str, str] = {}
    size = 0
    for file, tensors, room in files:
        sizes = write_tensors(folder / file, tensors, room)
        places |= dict.fromkeys(sizes, file)
        size += sum(sizes.values())
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(file: Path, tensors: Iterable[tuple[str, Tensor]], room: int) -> dict[str, int]:
    """Write tensors as safetensors does, but one at a time, so that no more is held than one; returns their bytes.

    Its own writer wants all of a file at once. `room` is kept in front for their names and places, which are known
    only in the end: JSON that blanks fill up (https://github.com/huggingface/safetensors, format).
    """
    room += -room % 8
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes: dict[str, int] = {}
    end = 0
    with file.open("wb") as opened:
        opened.seek(8 + room)
        for name, tensor in tensors:
            opened.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            place = [end, end + tensor.nbytes]
            header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
            sizes[name] = tensor.nbytes
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > room:  # and so over the first tensor
            raise RuntimeError(f"{len(text)} bytes of names and places, and room for {room}")
        opened.seek(0)
        opened.write(struct.pack("<Q", room) + text.ljust(room))
    return sizes
