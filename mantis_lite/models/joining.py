"""The weights of a model that is put together: those of its halves, by one model's names, and a fresh projector's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ..files import sync
from .assemble import Assembled, made
from .checkpoint import Checkpoint, read_config
from .halves import Half, tokenizer_of
from .upstream import renaming
from .weights import fingerprint, open_tensors, room_for_names, write_files

OF_16_BITS = {"bfloat16": torch.bfloat16, "float16": torch.float16}

WORDS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
"""What has a row for each token."""

NO_WEIGHTS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""What older checkpoints hold beside weights, and today's models count for themselves."""

ROOM = 4096
"""Bytes in front of a file for the names of a projector."""


def with_weights(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """The checkpoint with its weights on the disk: one that is put together, in the user's cache, from then on.

    `seed` is the projector's, whose first values are drawn. Of several processes one writes, and the others wait. No
    more is held than a tensor. Raises RecipeError, also where weights do not fit their config, and DiskError.
    """
    if not isinstance(checkpoint, Assembled):
        return checkpoint
    files = {half: half.weights() for half in (checkpoint.llm, checkpoint.tower)}
    facts = [checkpoint.folder.name, seed, *(fingerprint(each) for each in files.values())]
    folder = checkpoint.folder.with_name(sha256(json.dumps(facts).encode()).hexdigest()[:32])
    made(folder, partial(_write, checkpoint, files, seed))
    return replace(checkpoint, name=str(folder), folder=folder)


def _write(checkpoint: Assembled, files: dict[Half, list[Path]], seed: int, folder: Path) -> None:
    """Write all of it: a file of weights for each of the halves', and the projector in the last."""
    folder.mkdir()
    checkpoint.copy_small_files(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(deepcopy(checkpoint.config))
    tied = checkpoint.config.tie_word_embeddings
    _refuse_others(model, files, tied)
    _, _, new = tokenizer_of(checkpoint.llm)
    size = sum(file.stat().st_size for each in files.values() for file in each)
    if size > shutil.disk_usage(folder).free:
        raise OSError(f"it takes about {size / 1e9:,.1f} GB, more than is free")
    dtype = OF_16_BITS.get(checkpoint.published["torch_dtype"], torch.float32)
    rows = checkpoint.published["vocab_size"]
    flat = [(half, file) for half, each in files.items() for file in each]
    tensors = (
        chain(_taken(half, file, tied, rows, new), _projector(model, seed, dtype) if at == len(flat) else ())
        for at, (half, file) in enumerate(flat, 1)
    )
    names = [f"model-{at:05}-of-{len(flat):05}.safetensors" for at in range(1, len(flat) + 1)]
    rooms = (2 * room_for_names(file) + ROOM for _, file in flat)
    write_files(folder, zip(names, tensors, rooms, strict=True))
    for file in folder.iterdir():
        sync(file)


def _taken(half: Half, file: Path, tied: bool, rows: int, new: list[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by their published names, words with the rows of new ones."""
    with open_tensors(file) as opened:
        for key, name in _published(half, opened.keys(), tied).items():
            own = opened.get_tensor(key)
            yield name, _with_rows(own, rows, new) if name in WORDS else own


def _published(half: Half, keys: list[str], tied: bool) -> dict[str, str]:
    """A file's tensors that are taken, by their published names: neither a text tower's nor a second copy of words."""
    keys = [key for key in keys if not key.endswith(NO_WEIGHTS)]
    if half.key == "llm":
        return {key: f"language_model.{key}" for key in keys if not (tied and key == "lm_head.weight")}
    within = "vision_model."
    if half.kind.endswith("_vision_model"):  # transformers saves one without the prefix today
        own = [key for key in keys if key != "visual_projection.weight"]
        return {key: f"vision_tower.{within}{key.removeprefix(within)}" for key in own}
    return {key: f"vision_tower.{key}" for key in keys if key.startswith(within)}


def _with_rows(own: Tensor, rows: int, new: list[int]) -> Tensor:
    """Embeddings, or what words come out by (V, H), with rows for new tokens: each the mean of the others.

    So a token that no weights were trained with has the mean of all logits, which no choice goes by (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html); drawn ones may outdo every word that is right.
    """
    if not new:
        return own
    grown = own.new_empty(rows, own.shape[1])
    grown[: len(own)] = own
    grown[new] = own[: min(new)].mean(0, dtype=torch.float32).to(own.dtype)
    return grown


def _projector(model: PreTrainedModel, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A fresh projector as transformers draws one, by a seed."""
    projector = model.get_submodule("model.multi_modal_projector").to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        projector.apply(model._init_weights)
    for name, tensor in projector.state_dict().items():
        yield f"multi_modal_projector.{name}", tensor.to(dtype)


def _refuse_others(model: PreTrainedModel, files: dict[Half, list[Path]], tied: bool) -> None:
    """Raise RecipeError where a half has not all the weights, and no others, that its config says."""
    rename, wanted = renaming(model), {name: list(weight.shape) for name, weight in model.named_parameters()}
    for half, each in files.items():
        inside = "model.vision_tower." if half.key == "vision" else ("model.language_model.", "lm_head.")
        own = {name: shape for name, shape in wanted.items() if name.startswith(inside)}
        found: dict[str, list[int]] = {}
        for file in each:
            with open_tensors(file) as opened:
                names = _published(half, opened.keys(), tied)
                found |= {rename(name): opened.get_slice(key).get_shape() for key, name in names.items()}
        if half.key == "llm":  # before it is given rows
            words = read_config(half.folder).vocab_size
            own |= {name: [words, *own[name][1:]] for name in map(rename, WORDS) if name in own}
        if wrong := [name for name in sorted(own.keys() | found.keys()) if own.get(name) != found.get(name)]:
            shapes = f"{wrong[0]} is {found.get(wrong[0], 'missing')}, and should be {own.get(wrong[0], 'absent')}"
            raise half.refuse(f"has weights that do not fit its config: {len(wrong)}, first {shapes}")
