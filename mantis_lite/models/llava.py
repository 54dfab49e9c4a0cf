"""The LLaVA family as Mantis trained it: a CLIP or SigLIP tower, a two-layer projector and a Llama.

Mantis-8B-siglip-llama3, Mantis-8B-clip-llama3 and Mantis-llava-7b (Jiang et al. 2024, https://arxiv.org/abs/2405.01483).
"""

from __future__ import annotations

from collections.abc import Collection

from PIL.Image import Image as Picture
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..data.template import LLAMA_3, MLLAVA_V1, Token, Wrap
from ..data.vision import Pixels, Vision
from ..recipe import MediaRecipe
from .family import LLAMA_LAYERS, SIGLIP_LAYERS, Family, Processing, Projection
from .tower import see_a_few_at_a_time


def vision(
    config: PreTrainedConfig, processor: BaseImageProcessor, media: MediaRecipe, vocabulary: Collection[str]
) -> Vision:
    """How pictures enter: one crop each, wrapped as upstream's processor wraps them, counted from 1.

    CLIP gives 576 tokens at 336 px. SigLIP gives 728 at 384 px: it has no class token, but the published strategy
    "default" drops the first position all the same, a real patch, and the weights were trained so.
    """
    tower = config.vision_config
    positions = (tower.image_size // tower.patch_size) ** 2 + (tower.model_type == "clip_vision_model")
    tokens = positions - (config.vision_feature_select_strategy == "default")
    placeholder = Token("<image>")

    def pixels(picture: Picture) -> Pixels:
        return {"pixel_values": processor([picture], return_tensors="np")["pixel_values"]}

    return Vision(
        placeholder=placeholder,
        wrap=Wrap(before=lambda j: f"(image {j}: <Image>", after=lambda j: "</Image>)"),
        tokens=lambda size: ((placeholder, tokens),),
        patches=lambda size: positions,
        pixels=pixels,
        facts=f"llava {tokens} {positions}",
    )


def _processor(config: PreTrainedConfig, media: MediaRecipe) -> Processing:
    tower = config.vision_config
    more = {
        "processor_class": "LlavaProcessor",
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(tower.model_type == "clip_vision_model"),
    }
    return Processing(more, {})


def _read_layers(config: PreTrainedConfig) -> str:
    """The published vision_feature_layer of -2 leaves the last layer out: an adapter there would never learn."""
    layer = config.vision_feature_layer
    read = layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer
    return rf"(?:.*\.)?layers\.(?:{'|'.join(map(str, range(read)))})\."


LLAVA = Family(
    model_types=("llava",),
    templates=(LLAMA_3, MLLAVA_V1),
    parts={
        "language_model": ("model.language_model",),
        "projector": ("model.multi_modal_projector",),
        "vision_tower": ("model.vision_tower",),
    },
    targets={
        "language_model": LLAMA_LAYERS,
        "projector": ("linear_1", "linear_2"),
        "vision_tower": SIGLIP_LAYERS,
    },
    processor=_processor,
    vision=vision,
    tower_layers=_read_layers,
    adapt=lambda model: see_a_few_at_a_time(model, 0, "multi_modal_projector"),
    projection=Projection(
        rows=lambda vision, size: vision.placeholders(size),
        run=lambda model, hidden: model.multi_modal_projector(hidden),
    ),
)
