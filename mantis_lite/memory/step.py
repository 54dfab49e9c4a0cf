"""What of a training step memory goes by: the row that it is given, and the machine it runs on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from ..models.activations import checkpointed_layers
from ..models.kernels import KERNELS
from ..models.tower import TOWER_PATCHES
from ..recipe import PARTED, Kernel, MemoryRecipe, Part, Recipe, Strategy


@dataclass(frozen=True)
class Pack:
    """The largest row of a run: tokens, of which `supervised` have loss, in samples of at most `longest`; and pictures.

    `grids` are the (rows, columns) of the vision tower's positions for each picture, or each view of one. `waiting` is
    how many times its pictures are on the card beside them: transformers' Trainer fetches all rows of an optimizer step
    at once (`get_batch_samples`). `shown` are the tokens that stand for pictures. `members` are the places of its
    samples in the data, where there is any.
    """

    tokens: int
    longest: int
    supervised: int
    grids: tuple[tuple[int, int], ...] = ()
    waiting: float = 0.0
    shown: int = 0
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
    sdpa or eager; `kernels` are the layers that one kernel computes; `head` is fused (TRL's), full (all logits at once,
    in float32), "full, 16 bits" or none. `offload` sends what layers keep to the host; `accumulates` is whether
    gradients of a row before are there already. What trains is held in `trained`. `cached` are the parts that pictures
    have been through before the step, and which are not on the card. It is one of so many `gpus`, which train by
    `strategy`.
    """

    gpu: bool = True
    dtype: torch.dtype = torch.bfloat16
    checkpointed: int | None = None
    mlp_tile: int | None = None
    attention: str = "segment"
    kernels: frozenset[Kernel] = frozenset()
    head: str = "fused"
    offload: bool = False
    accumulates: bool = True
    trained: torch.dtype = torch.float32
    cached: frozenset[Part] = frozenset()
    strategy: Strategy = "single"
    gpus: int = 1

    @property
    def sharded(self) -> bool:
        """Whether the GPU holds a share of gradients and of the optimizer's state, and no more."""
        return self.strategy not in ("single", "ddp")

    @property
    def parts_weights(self) -> bool:
        """Whether it holds a share of the weights, too."""
        return self.strategy in PARTED

    @property
    def offloads_weights(self) -> bool:
        """Whether the host holds that, and the optimizer's state."""
        return self.strategy == "zero3_offload"

    @property
    def keeps_float32(self) -> bool:
        """Whether what trains is in float32 beside what it computes with; ZeRO-3 takes that, where it is the same."""
        return self.strategy == "zero2" or (self.strategy == "zero3" and self.trained != torch.float32)


def machine_of(recipe: Recipe, accumulates: bool, gpu: bool = True) -> Machine:
    """The machine that a recipe would run on: a GPU, or this CPU in float32."""
    memory = recipe.memory
    dtype = torch.bfloat16 if gpu else torch.float32
    return Machine(
        gpu=gpu,
        dtype=dtype,
        checkpointed=checkpointed_layers(memory, gpu),
        mlp_tile=memory.mlp_tile,
        attention=memory.attention if memory.attention in ("sdpa", "eager") else "segment",
        kernels=_kernels(memory, gpu),
        head="none" if recipe.task == "classify" else "fused",
        offload=memory.offload_activations and gpu,
        accumulates=accumulates,
        trained=dtype if recipe.strategy.startswith("zero") else torch.float32,
        cached=_cached(recipe),
        strategy=recipe.strategy,
        gpus=recipe.launch.size,
    )


def _kernels(memory: MemoryRecipe, gpu: bool) -> frozenset[Kernel]:
    """With "auto" those that training would take on a GPU beside what is installed here."""
    if memory.kernels == "off":
        return frozenset()
    there = KERNELS if gpu and (memory.kernels != "auto" or find_spec("liger_kernel")) else ("lora",)
    return frozenset(there if memory.kernels == "auto" else set(memory.kernels) & set(there))


def _cached(recipe: Recipe) -> frozenset[Part]:
    if recipe.memory.vision_cache == "off":
        return frozenset()
    return frozenset(["vision_tower", "projector"] if recipe.part("projector") == "frozen" else ["vision_tower"])


def grid(patches: int, size: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """Rows and columns of so many patches in a picture of about this shape, (width, height)."""
    rows = max(1, round(math.sqrt(patches * size[1] / size[0])))
    return rows, max(1, round(patches / rows))
