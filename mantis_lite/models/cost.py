"""A model's config and what of it trains -> what a sample costs to train on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from ..data.cost import Cost
from ..recipe import Recipe
from .adapters import part_of
from .family import Family

PATCHES = 1000
"""Positions of a picture that comes in its own shape: about Mantis-Instruct's mean."""

BACKWARD = 2.5
"""Attention's products are five in the backward pass, with those of the forward pass again, and two before it."""


def cost_of(config: PreTrainedConfig, family: Family, recipe: Recipe) -> Cost:
    """FLOPs of a step of a recipe: of the language model with its head, and of the tower.

    A layer is run once, once more where it is computed again, once for its inputs' gradient and once for its weights'
    where they train. The projector, adapters and what memory.vision_cache spares are left out.
    """
    once = forward_cost(config, family)
    again = recipe.memory.checkpointing != "off"
    language, tower = recipe.part("language_model"), recipe.part("vision_tower")
    sees = 1 if tower == "frozen" else 2 + again + (tower == "full")
    return Cost(
        once.per_token * (2 + again + (language == "full")),
        once.per_token_squared * (1 + again + BACKWARD),
        once.per_patch * sees,
    )


def forward_cost(config: PreTrainedConfig, family: Family) -> Cost:
    """FLOPs of a forward pass: two for each weight that a position meets, and those of attention."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    weights = {"language_model": 0, "projector": 0, "vision_tower": 0}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weights[part_of(name, family)] += module.weight.numel()
    text, tower = config.get_text_config(), getattr(config, "vision_config", None)
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    causal = 2 * text.num_hidden_layers * heads  # half of each position with each
    return Cost(2 * weights["language_model"], causal, 2 * weights["vision_tower"] + _seen(tower))


def _seen(tower: PreTrainedConfig | None) -> int:
    """What a position of a tower spends on attention to its picture."""
    if tower is None:
        return 0
    layers = getattr(tower, "num_hidden_layers", None) or tower.depth
    width = getattr(tower, "embed_dim", None) or tower.hidden_size
    most = (getattr(tower, "image_size", None) or 10**6) // tower.patch_size
    return 4 * layers * width * min(most**2, PATCHES)
