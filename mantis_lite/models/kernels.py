"""Layers in one kernel: Liger's (Hsu et al. 2024, https://arxiv.org/abs/2410.10989), and LoRA's own product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any, NamedTuple, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import RecipeError
from ..recipe import Kernel, Recipe
from .adapters import part_of
from .family import Family
from .fused_lora import fuse_lora, hindrance

KERNELS: tuple[Kernel, ...] = get_args(Kernel)

ROTATES = "apply_rotary_pos_emb"
"""What the attention of every language model of transformers calls to turn its queries and keys."""


class Layers(NamedTuple):
    """How many layers of a part one kernel computes, or why it does not."""

    kernel: Kernel
    part: str
    number: int
    why_not: str | None


def chosen_kernels(recipe: Recipe) -> dict[Kernel, str | None]:
    """Each kernel under a recipe's `memory.kernels`: None where it is used, else why it is not.

    "auto" takes what there is: LoRA's product anywhere, Liger's on an NVIDIA GPU where it is installed. Raises
    RecipeError where a kernel was named that cannot run here.
    """
    stated = recipe.memory.kernels
    named = () if isinstance(stated, str) else stated
    missing = {name: None if name == "lora" else _missing_liger(recipe) for name in KERNELS}
    for name in named:
        if missing[name]:
            raise RecipeError(f"memory.kernels: {name} cannot run here: {missing[name]}\n  Leave it out, or use auto.")
    wanted = KERNELS if stated == "auto" else named
    return {name: missing[name] if name in wanted else "switched off" for name in KERNELS}


def used_kernels(recipe: Recipe) -> list[Kernel]:
    """The kernels that are used under a recipe here. Raises RecipeError as `chosen_kernels` does."""
    return [kernel for kernel, why_not in chosen_kernels(recipe).items() if why_not is None]


def fuse(model: nn.Module, kernels: Collection[Kernel]) -> None:
    """Let the layers that these kernels can compute do so; weights and names stay as they are.

    A layer is known by what it is, not by the model's name, so that a Llama or Mistral within another model counts.
    Only this model changes: Liger's own patches change transformers' classes for the whole process.
    """
    bind: dict[Kernel, Callable[[Any], None]] = {
        "lora": fuse_lora,
        "rms_norm": _rms_norm,
        "rope": _rope,
        "swiglu": _swiglu,
        "layer_norm": _layer_norm,
        "relu_squared": _relu_squared,
    }
    bind_layers(model, {kernel: bind[kernel] for kernel in kernels})


def bind_layers(model: nn.Module, bind: Mapping[Kernel, Callable[[Any], None]]) -> None:
    """Change each layer that a kernel could compute as `bind` has it for that kernel, where there is no hindrance."""
    for module in list[Any](model.modules()):
        kernel = kernel_of(module)
        if kernel is not None and kernel in bind and hindrance(module) is None:
            bind[kernel](module)
            module.computed_by = kernel


def kernel_of(module: nn.Module) -> Kernel | None:
    """The kernel that could compute a layer."""
    children = dict(module.named_children())
    if isinstance(module, LoraLayer):
        return "lora"
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return "rms_norm"
    if type(module) is nn.LayerNorm and module.bias is not None and len(module.normalized_shape) == 1:
        return "layer_norm"
    if {"gate_proj", "up_proj", "down_proj"} <= children.keys():
        return "swiglu" if type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation") else None
    if type(module).__name__ == "ReLUSquaredActivation":
        return "relu_squared"
    code = getattr(type(module).forward, "__code__", None)
    return "rope" if code is not None and ROTATES in code.co_names else None


def fused_layers(model: nn.Module, family: Family, chosen: dict[Kernel, str | None]) -> list[Layers]:
    """What is computed in one kernel and what is not, by kernel and part; `chosen` says why not."""
    counts: Counter[tuple[Kernel, str, str | None]] = Counter()
    for name, module in model.named_modules():
        if kernel := kernel_of(module):
            fused = hasattr(module, "computed_by")
            why = None if fused else chosen[kernel] or hindrance(module) or "left as it is"
            counts[kernel, part_of(name, family).replace("_", " "), why] += 1
    return [Layers(kernel, part, count, why) for (kernel, part, why), count in sorted(counts.items(), key=_in_order)]


def words(layers: Collection[Layers]) -> Iterator[str]:
    """A line of what is fused, and a line of what is not and why."""
    done = [f"{number} {kernel} of the {part}" for kernel, part, number, why in layers if why is None]
    left = [f"{number} {kernel} of the {part} ({why})" for kernel, part, number, why in layers if why is not None]
    yield f"layers in one kernel: {', '.join(done) or 'none'}"
    if left:
        yield f"layers not in one kernel: {', '.join(left)}"


def _in_order(item: tuple[tuple[Kernel, str, str | None], int]) -> tuple[int, str, str]:
    kernel, part, why = item[0]
    return KERNELS.index(kernel), part, why or ""


def _missing_liger(recipe: Recipe) -> str | None:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    if recipe.train.get("use_cpu"):
        return "train.use_cpu"
    return None if find_spec("liger_kernel") else "needs pip install 'mantis-lite[gpu]'"


# Liger is imported where it is used: it and Triton take seconds, and both are extras.


def _rms_norm(module: Any) -> None:
    from liger_kernel.transformers import LigerRMSNorm

    module.offset, module.casting_mode, module.in_place, module.row_mode = 0.0, "llama", True, None
    module.forward = MethodType(LigerRMSNorm.forward, module)


def _layer_norm(module: Any) -> None:
    from liger_kernel.transformers import LigerLayerNorm

    module.variance_epsilon = module.eps
    module.forward = MethodType(LigerLayerNorm.forward, module)


def _swiglu(module: Any) -> None:
    from liger_kernel.transformers import LigerSwiGLUMLP

    module.forward = MethodType(LigerSwiGLUMLP.forward, module)


def _relu_squared(module: Any) -> None:
    from liger_kernel.transformers.relu_squared import LigerReLUSquared

    module.forward = MethodType(LigerReLUSquared.forward, module)


def _rope(module: Any) -> None:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    turn_by(liger_rotary_pos_emb, module)


def turn_by(function: Callable, module: Any) -> None:
    """Let an attention, its forward pass otherwise its own, turn queries and keys by another function (ROTATES)."""
    own = type(module).forward
    known = {**own.__globals__, ROTATES: function}
    other = FunctionType(own.__code__, known, own.__name__, own.__defaults__, own.__closure__)
    other.__kwdefaults__ = own.__kwdefaults__
    module.forward = MethodType(other, module)
