"""Weights: in the precision the machine has, in 4 bits where asked for, with attention for packs."""

from __future__ import annotations

import gc
import os
import re
import traceback
from collections.abc import Collection, Iterator
from copy import deepcopy
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from ..errors import RecipeError
from ..process import cores
from ..recipe import Part, Recipe
from .activations import keep_less
from .adapters import HEAD, part_of
from .attention import require_attention, use_attention
from .checkpoint import Checkpoint
from .family import Family
from .head import classifier_of
from .kernels import fuse, used_kernels
from .precision import weights_dtype
from .small_files import unreadable


def loader_workers() -> int:
    """Processes that decode pictures beside each GPU; on a CPU they would only take its cores."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(4, max(1, cores() // beside)) if torch.cuda.is_available() else 0


def load_model(
    checkpoint: Checkpoint,
    recipe: Recipe,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a checkpoint's weights under a recipe, for training or in another `dtype`.

    Full fine-tuning holds its weights in float32 and computes in the working dtype. For task=classify, `config` states
    the head, a fresh one where the checkpoint has none. Raises RecipeError where the weights do not fit the
    architecture exactly, or a kernel that the recipe names cannot run here.
    """
    require_attention(recipe.memory.attention)
    if torch.cuda.is_available():
        gc.collect()  # a model that a notebook has let go of lies in circles, and would keep the card from this one
    dtype = dtype or weights_dtype(recipe)
    model, info = _from_pretrained(checkpoint, recipe, dtype, deepcopy(config or checkpoint.config))
    if recipe.task == "classify" and not checkpoint.has_head:
        info["missing_keys"] = set(info["missing_keys"]) - {f"{HEAD}.weight", f"{HEAD}.bias"}
    faults = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys") if info[name]}
    if faults:
        found = "; ".join(f"{len(keys)} {name.replace('_', ' ')}, first {keys[0]}" for name, keys in faults.items())
        raise RecipeError(
            f"model: the weights of {checkpoint.name} do not fit the architecture: {found}\n"
            "  Take the checkpoint as it was published."
        )
    if recipe.quantized:
        _check_quantized(model, checkpoint.family, recipe)
    # Under ZeRO-3 those that no published layout of this model needed are kept as well, and it would be saved by them.
    model._weight_conversions = [names for names in model._weight_conversions if names.was_used()]
    model.name_or_path = model.config.name_or_path = checkpoint.public_name  # what an adapter names as its base
    checkpoint.family.adapt(model, checkpoint.image_processor)
    fuse(model, used_kernels(recipe))
    keep_less(model, recipe.memory)
    use_attention(model, recipe.memory.attention)
    return model


def placed(batch: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """A batch where the model is, its pixels in the model's precision, however a family lays them out."""
    cast = recursively_apply(lambda t: t.to(model.dtype) if t.is_floating_point() else t, batch)
    return send_to_device(cast, model.device)


def _from_pretrained(
    checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype, config: PreTrainedConfig
) -> tuple[PreTrainedModel, dict]:
    auto = classifier_of(config) if recipe.task == "classify" else AutoModelForImageTextToText
    try:
        return auto.from_pretrained(
            checkpoint.name,
            config=config,
            revision=checkpoint.commit,
            dtype=dtype,
            quantization_config=_quantization(checkpoint.family, recipe, dtype),
            use_safetensors=True,
            device_map={"": torch.cuda.current_device()} if recipe.quantized and torch.cuda.is_available() else None,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if full := [line for line in _noted(error) if "OutOfMemoryError" in line]:
            raise torch.OutOfMemoryError(full[-1]) from None
        raise unreadable(f"the weights of {checkpoint.name}", error) from None


def _noted(error: Exception) -> Iterator[str]:
    """What went wrong with single weights: transformers catches it, and raises another error that names none."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for note in getattr(frame.f_locals.get("loading_info"), "conversion_errors", {}).values():
            yield from note.splitlines()


def _quantization(family: Family, recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if not recipe.quantized:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # of one kind with the other weights, as ZeRO and FSDP shard them
        # A list given replaces the default one, which keeps lm_head; names are whole prefixes.
        llm_int8_skip_modules=["lm_head", HEAD, *_skipped(family, recipe.quantized)],
    )


def _skipped(family: Family, quantized: Collection[Part]) -> Iterator[str]:
    """The parts that keep their precision, as regular expressions: a projector in 4 bits may lie within the tower."""
    into = [path for part in quantized for path in family.parts.get(part, ())]
    for part, paths in family.parts.items():
        for path in paths if part not in quantized else ():
            within = [re.escape(other.removeprefix(f"{path}.")) for other in into if other.startswith(f"{path}.")]
            but = rf"(?!\.(?:{'|'.join(within)})(?:\.|$))" if within else ""
            yield path + but


def _check_quantized(model: PreTrainedModel, family: Family, recipe: Recipe) -> None:
    """The skip list is matched by name and says nothing where it matches nothing: look at what is in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            # Or on some CPUs it computes otherwise once it no longer trains, and fails on layers of an odd width.
            module.support_avx512bf16_for_cpu = False
        # The pooling head of a SigLIP, which no family here reads, has a layer that bitsandbytes knows not to take.
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
            wanted = name not in ("lm_head", HEAD) and part_of(name, family) in recipe.quantized
            assert isinstance(module, Linear4bit) == wanted, f"{name} is quantised, or is not, against the recipe"
