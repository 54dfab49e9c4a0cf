"""Fused layers of the language model: Liger's RMSNorm and SwiGLU (Hsu et al. 2024, https://arxiv.org/abs/2410.10989)."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import RecipeError


def require_liger() -> None:
    """Refuse `memory.kernels=liger` where it cannot run, before a weight is loaded. Raises RecipeError."""
    if not torch.cuda.is_available():
        raise RecipeError("memory.kernels: liger needs an NVIDIA GPU, and there is none\n  Leave it out.")
    if find_spec("liger_kernel") is None:
        raise RecipeError("memory.kernels: liger-kernel is not installed\n  pip install 'mantis-lite[gpu]'")


def fuse(model: PreTrainedModel) -> None:
    """Let every RMSNorm and SwiGLU of the language model compute in one kernel; weights and names stay as they are.

    A layer is known by what it is, not by the model's name, so that a Llama or Mistral within another model counts.
    Raises RecipeError where there is none, as in Fuyu's Persimmon.
    """
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP  # triton takes seconds to import

    decoder = model.get_decoder()
    silu = getattr(decoder.config, "hidden_act", None) in ("silu", "swish")
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.offset, module.casting_mode, module.in_place, module.row_mode = 0.0, "llama", True, None
            module.forward = MethodType(LigerRMSNorm.forward, module)
        elif silu and {"gate_proj", "up_proj", "down_proj"} <= dict(module.named_children()).keys():
            module.forward = MethodType(LigerSwiGLUMLP.forward, module)
    if not fused(model):
        kind = decoder.config.model_type
        raise RecipeError(f"memory.kernels: {kind} has no layer that Liger fuses here\n  Leave it out.")


def fused(model: nn.Module) -> Counter[str]:
    """How many layers compute in one of Liger's kernels, by kernel."""
    bound = (getattr(module.__dict__.get("forward"), "__func__", None) for module in model.modules())
    names = (getattr(function, "__qualname__", "") for function in bound)
    return Counter(name.partition(".")[0] for name in names if name.startswith("Liger"))
