"""What numbers weights are held in, and what is computed in."""

from __future__ import annotations

import torch

from ..recipe import Recipe


def working_dtype() -> torch.dtype:
    """float32 on a CPU; bfloat16 where the GPU has it (compute capability 8.0 and newer), else float16."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """What weights are held in that are not in 4 bits: full fine-tuning's in float32, others' as they compute."""
    return torch.float32 if in_float32(recipe) else working_dtype()


def in_float32(recipe: Recipe) -> bool:
    """Whether all weights are, as in full fine-tuning; where a projector alone learns, it is once it is loaded.

    DeepSpeed keeps float32 of what trains beside.
    """
    parts = recipe.parts
    alone = parts["projector"] == "full" and parts["language_model"] == parts["vision_tower"] == "frozen"
    return recipe.method == "full" and not alone and not recipe.strategy.startswith("zero")
