"""What of a training step memory goes by: the row that it is given, and the machine it runs on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from ..models.activations import checkpointed_layers
from ..models.tower import TOWER_PATCHES
from ..recipe import MemoryRecipe, Recipe


@dataclass(frozen=True)
class Pack:
    """The largest row of a run: tokens, of which `supervised` have loss, in samples of at most `longest`; and pictures.

    `grids` are the (rows, columns) of the vision tower's positions for each picture, or each view of one. `waiting` is
    how many times its pictures are on the card beside them: transformers' Trainer fetches all rows of an optimizer step
    at once (`get_batch_samples`). `members` are the places of its samples in the data, where there is any.
    """

    tokens: int
    longest: int
    supervised: int
    grids: tuple[tuple[int, int], ...] = ()
    waiting: float = 0.0
    members: tuple[int, ...] = field(default=(), compare=False)

    @property
    def crowd(self) -> int:
        """Positions of the most pictures of a shape that go through Idefics2's tower and connector at a time."""
        crowds = (min(TOWER_PATCHES, r * c * count) for (r, c), count in Counter(self.grids).items())
        return max(crowds, default=0)

    @property
    def patches(self) -> int:
        """Positions of the vision tower in all."""
        return sum(rows * columns for rows, columns in self.grids)


@dataclass(frozen=True)
class Machine:
    """Where and how a step runs, as far as memory goes.

    `gpu` is whether its kernels are a GPU's; `dtype` the precision computed in. `checkpointed` is how many layers are
    computed again (None: all), `mlp_tile` how many tokens an MLP sees at a time (None: all). `attention` is segment,
    sdpa or eager; `fused` whether RMSNorm and SwiGLU are single kernels; `head` is fused (TRL's), full (all logits at
    once, in float32), "full, 16 bits" or none. `offload` sends what layers keep to the host; `accumulates` is whether
    gradients of a row before are there already. What trains is held in `trained`.
    """

    gpu: bool = True
    dtype: torch.dtype = torch.bfloat16
    checkpointed: int | None = None
    mlp_tile: int | None = None
    attention: str = "segment"
    fused: bool = False
    head: str = "fused"
    offload: bool = False
    accumulates: bool = True
    trained: torch.dtype = torch.float32


def machine_of(recipe: Recipe, accumulates: bool, gpu: bool = True) -> Machine:
    """The machine that a recipe would run on: a GPU, or this CPU in float32."""
    memory = recipe.memory
    return Machine(
        gpu=gpu,
        dtype=torch.bfloat16 if gpu else torch.float32,
        checkpointed=checkpointed_layers(memory, gpu),
        mlp_tile=memory.mlp_tile,
        attention=memory.attention if memory.attention in ("sdpa", "eager") else "segment",
        fused=gpu and _fuses(memory),
        head="none" if recipe.task == "classify" else "fused",
        offload=memory.offload_activations and gpu,
        accumulates=accumulates,
    )


def _fuses(memory: MemoryRecipe) -> bool:
    """Whether RMSNorm and SwiGLU are single kernels; with "auto" where they can be seen to be, as training does."""
    if memory.kernels == "auto":
        return torch.cuda.is_available() and find_spec("liger_kernel") is not None
    return {"rms_norm", "swiglu"} <= set(memory.kernels)


def grid(patches: int, size: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """Rows and columns of so many patches in a picture of about this shape, (width, height)."""
    rows = max(1, round(math.sqrt(patches * size[1] / size[0])))
    return rows, max(1, round(patches / rows))
