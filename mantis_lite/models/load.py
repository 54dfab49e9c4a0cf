"""Weights: in the precision the machine has, in 4 bits where asked for, with attention for packs."""

from __future__ import annotations

import gc
import os
import re
import traceback
from collections.abc import Collection, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from ..errors import RecipeError
from ..recipe import HeadRecipe, Part, Recipe
from .activations import keep_less
from .adapters import HEAD, part_of
from .attention import require_attention, use_attention
from .checkpoint import Checkpoint
from .family import Family
from .head import classifier_of, labels_of
from .kernels import fuse, used_kernels
from .small_files import read_small, refuse_settings, unreadable


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


def loader_workers() -> int:
    """Processes that decode pictures beside each GPU; on a CPU they would only take its cores."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(4, max(1, len(os.sched_getaffinity(0)) // beside)) if torch.cuda.is_available() else 0


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


def stated_head(checkpoint: Checkpoint, recipe: Recipe) -> HeadRecipe | None:
    """The head that a recipe trains, where its task has one; with the labels of a head that is there already.

    Raises RecipeError where what is to be trained on scores something else, or does not say what.
    """
    if recipe.task != "classify":
        return None
    name, config = checkpoint.name, checkpoint.config if checkpoint.has_head else None
    if recipe.model.adapter and (Path(recipe.model.adapter) / "config.json").is_file():
        name, config = recipe.model.adapter, read_config(Path(recipe.model.adapter))
    if config is None:
        return recipe.head
    labels = labels_of(config, recipe.head, name)
    if labels.problem != recipe.head.problem:
        found = f"{recipe.head.problem}, and the head of {name} was trained for {labels.problem}"
        raise RecipeError(f"head.problem: {found}\n  Set head.problem={labels.problem}.")
    if bool(getattr(config, "score_token_ids", None)) != (recipe.head.score == "special_tokens"):
        found = f"{recipe.head.score}, and the head of {name} reads its labels otherwise"
        raise RecipeError(f"head.score: {found}\n  Set it as the head was trained.")
    if recipe.head.labels is None and labels.names[0] == "LABEL_0":
        found = f"the head of {name} has {len(labels.names)} labels and does not name them"
        raise RecipeError(f"head.labels: {found}\n  State them, in its order.")
    return recipe.head.model_copy(update={"labels": list(labels.names)})


def read_config(folder: Path) -> PreTrainedConfig:
    """The config beside an adapter, which states its score head. Raises RecipeError."""
    file = folder / "config.json"
    settings = read_small(file)
    refuse_settings(file, settings)
    try:
        return AutoConfig.for_model(**settings)
    except (TypeError, ValueError) as error:  # of no model, or of none that is known
        raise unreadable(file, error) from None


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
