"""What of the forward pass is kept for the backward pass: layers computed again, and wide layers a tile at a time."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..recipe import MemoryRecipe
from .tiles import split_mlp, tile_mlp

CPU_STRETCH = 512
"""Tokens that an MLP sees at a time on a CPU, so that what it makes of them stays in its caches: packs are long."""


def keep_less(model: PreTrainedModel, memory: MemoryRecipe) -> None:
    """Set a loaded base model to keep as little as the recipe says."""
    layers = checkpointed_layers(memory)
    if layers != 0:
        checkpoint_layers(model, layers)
    if memory.mlp_tile:
        tile_mlps(model, memory.mlp_tile)
    elif not torch.cuda.is_available():
        split_mlps(model)


def checkpointed_layers(memory: MemoryRecipe, gpu: bool | None = None) -> int | None:
    """How many layers of the language model are computed again, None being all: on a GPU, unless the recipe says.

    Whether there is a `gpu` is looked up where it is not said.
    """
    if isinstance(memory.checkpointing, int):
        return memory.checkpointing
    gpu = torch.cuda.is_available() if gpu is None else gpu
    full = memory.checkpointing == "full" or (memory.checkpointing == "auto" and gpu)
    return None if full else 0


def checkpoint_layers(model: PreTrainedModel, count: int | None) -> None:
    """Keep only the input of the language model's first `count` layers (None: all), of all the tower's and a projector.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174. The last layers are those whose inputs are let go first.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in islice(decoder_layers(model), count, None) if count is not None else ():
        layer.gradient_checkpointing = False
    for module in model.modules():
        if hasattr(module, "computed_again"):  # models/tower.py
            module.computed_again = True


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of the language model that can be computed again, from the first."""
    decoder = model.get_decoder()  # type: ignore[operator]
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def tile_mlps(model: PreTrainedModel, tokens: int) -> None:
    """Let the language model's MLPs see `tokens` at a time, and compute each stretch again in the backward pass."""
    for layer in decoder_layers(model):
        tile_mlp(layer.mlp, tokens)


def split_mlps(model: PreTrainedModel) -> None:
    """Let the language model's MLPs see CPU_STRETCH tokens at a time."""
    for layer in decoder_layers(model):
        split_mlp(layer.mlp, CPU_STRETCH)
