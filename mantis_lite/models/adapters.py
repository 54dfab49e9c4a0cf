"""What trains: LoRA on the parts that take an adapter, whole parts in full, everything else frozen."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..recipe import LoraRecipe, Part, Recipe, Training
from . import llava


class PartSize(NamedTuple):
    """Parameters of a part, in all and those that train; a 4-bit weight counts as the parameters it stands for."""

    part: str
    parameters: int
    trainable: int


def make_trainable(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """Freeze, lay on adapters and unfreeze, as the recipe says part by part. Raises RecipeError."""
    parts = recipe.parts
    tower = model.get_submodule(llava.PARTS["vision_tower"])
    model.requires_grad_(False)
    if recipe.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parts[part_of(name)] == "full")
    else:
        model = get_peft_model(model, lora_config(model, parts, recipe.lora, recipe.model.revision))
    if parts["vision_tower"] == "frozen":
        _without_autograd(tower)
    return model


def lora_config(
    model: PreTrainedModel, parts: Mapping[Part, Training], lora: LoraRecipe, revision: str | None = None
) -> LoraConfig:
    """PEFT's settings; target_modules is one regular expression anchored on each part that takes an adapter.

    A list of names would be matched by suffix, and so land in the vision tower as well (PEFT's rule).
    """
    adapted = [part for part, training in parts.items() if training == "adapter"]
    whole = [llava.PARTS[part].rpartition(".")[2] for part, training in parts.items() if training == "full"]
    linear = {part: _linear_layers(model, part) for part in adapted}
    found = set[str]().union(*linear.values())
    if missing := [name for name in lora.target_modules or () if name not in found]:
        raise RecipeError(
            f"lora.target_modules: the {' and '.join(adapted)} has no linear layer {', '.join(missing)}\n"
            f"  It has {', '.join(sorted(found))}."
        )
    wanted = {part: [n for n in lora.target_modules or llava.TARGETS[part] if n in linear[part]] for part in adapted}
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        target_modules="|".join(_targets(model, part, names) for part, names in wanted.items() if names) or None,
        modules_to_save=whole or None,
        task_type="CAUSAL_LM",
        revision=revision,
    )


def part_of(parameter: str) -> Part:
    """The part a parameter belongs to, by its name in the model or under PEFT; lm_head is the language model's."""
    for part in ("projector", "vision_tower"):
        if f"{llava.PARTS[part]}." in parameter:
            return part
    return "language_model"


def part_sizes(model: nn.Module) -> list[PartSize]:
    """How many parameters each part has, and how many of them train."""
    sizes: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        count = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)  # two 4-bit weights in a byte
        sizes[part_of(name)][0] += count
        sizes[part_of(name)][1] += count if parameter.requires_grad else 0
    return [PartSize(part, *sizes[part]) for part in llava.PARTS]


def _linear_layers(model: PreTrainedModel, part: Part) -> set[str]:
    path = llava.PARTS[part]
    return {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and path in n}


def _targets(model: PreTrainedModel, part: Part, names: list[str]) -> str:
    layers = ""
    if part == "vision_tower":  # an adapter on a layer whose output nobody reads would never learn
        layers = rf"layers\.(?:{'|'.join(map(str, range(llava.vision_layers(model.config))))})\."
    return rf"{re.escape(llava.PARTS[part])}\.(?:.*\.)?{layers}(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def _without_autograd(tower: nn.Module) -> None:
    """Run a frozen tower without recording: gradient checkpointing would otherwise make its inputs need gradients."""
    tower.forward = torch.no_grad()(tower.forward)
