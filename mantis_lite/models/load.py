"""Weights: in the precision the machine has, in 4 bits where asked for, with attention for packs."""

from __future__ import annotations

from copy import deepcopy

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from ..errors import RecipeError
from ..recipe import Recipe
from .adapters import part_of
from .attention import use_attention
from .checkpoint import Checkpoint, unreadable
from .family import Family
from .kernels import fuse


def working_dtype() -> torch.dtype:
    """float32 on a CPU; bfloat16 where the GPU has it (compute capability 8.0 and newer), else float16."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def load_model(checkpoint: Checkpoint, recipe: Recipe) -> PreTrainedModel:
    """Load a checkpoint's weights for training under a recipe.

    Full fine-tuning holds its weights in float32 and computes in the working dtype. Raises RecipeError where the
    weights do not fit the architecture exactly.
    """
    dtype = torch.float32 if recipe.method == "full" else working_dtype()
    model, info = _from_pretrained(checkpoint, recipe, dtype)
    faults = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys") if info[name]}
    if faults:
        found = "; ".join(f"{len(keys)} {name.replace('_', ' ')}, first {keys[0]}" for name, keys in faults.items())
        raise RecipeError(
            f"model: the weights of {checkpoint.name} do not fit the architecture: {found}\n"
            "  Take the checkpoint as it was published."
        )
    if recipe.quantized:
        _check_quantized(model, checkpoint.family, recipe)
    checkpoint.family.adapt(model)
    if recipe.memory.kernels == "liger":
        fuse(model)
    use_attention(model, recipe.memory.attention)
    return model


def _from_pretrained(checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype) -> tuple[PreTrainedModel, dict]:
    try:
        return AutoModelForImageTextToText.from_pretrained(
            checkpoint.name,
            config=deepcopy(checkpoint.config),
            revision=checkpoint.revision,
            dtype=dtype,
            quantization_config=_quantization(checkpoint.family, recipe, dtype),
            device_map={"": 0} if recipe.quantized and torch.cuda.is_available() else None,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise unreadable(f"the weights of {checkpoint.name}", error) from None


def _quantization(family: Family, recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if not recipe.quantized:
        return None
    skipped = [path for part, paths in family.parts.items() if part not in recipe.quantized for path in paths]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # A list given replaces the default one, which keeps lm_head; names are whole prefixes.
        llm_int8_skip_modules=["lm_head", *skipped],
    )


def _check_quantized(model: PreTrainedModel, family: Family, recipe: Recipe) -> None:
    """The skip list is matched by name and says nothing where it matches nothing: count what is in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            wanted = name != "lm_head" and part_of(name, family) in recipe.quantized
            assert isinstance(module, Linear4bit) == wanted, f"{name} is quantised, or is not, against the recipe"
