"""The LLaVA family as Mantis trained it: a CLIP or SigLIP tower, a two-layer projector and a Llama.

Mantis-8B-siglip-llama3, Mantis-8B-clip-llama3 and Mantis-llava-7b (Jiang et al. 2024, https://arxiv.org/abs/2405.01483).
"""

from __future__ import annotations

import numpy as np
from PIL.Image import Image as Picture
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..data.encode import Vision
from ..data.template import Token
from ..recipe import Part

MODEL_TYPE = "llava"

PARTS: dict[Part, str] = {
    "language_model": "model.language_model",
    "projector": "model.multi_modal_projector",
    "vision_tower": "model.vision_tower",
}
"""Where each part lives in LlavaForConditionalGeneration."""

TARGETS: dict[Part, list[str]] = {
    "language_model": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "projector": ["linear_1", "linear_2"],
    "vision_tower": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
"""The linear layers of each part that an adapter is laid on."""


def vision_layers(config: PreTrainedConfig) -> int:
    """How many of the tower's layers are read: the published -2 leaves the last one out."""
    layer = config.vision_feature_layer
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


def vision(config: PreTrainedConfig, processor: BaseImageProcessor) -> Vision:
    """How pictures enter: one crop each, wrapped as upstream's processor wraps them, counted from 1.

    CLIP gives 576 tokens at 336 px. SigLIP gives 728 at 384 px: it has no class token, but the published strategy
    "default" drops the first position all the same, a real patch, and the weights were trained so.
    """
    tower = config.vision_config
    positions = (tower.image_size // tower.patch_size) ** 2 + (tower.model_type == "clip_vision_model")
    tokens = positions - (config.vision_feature_select_strategy == "default")

    def pixels(pictures: list[Picture]) -> dict[str, np.ndarray]:
        return {"pixel_values": np.stack(processor(pictures, return_tensors="np")["pixel_values"])}

    return Vision(
        token=Token("<image>"),
        wrap=lambda j: (f"(image {j}: <Image>", "</Image>)"),
        tokens=lambda size: tokens,
        patches=lambda size: positions,
        pixels=pixels,
        facts=f"llava {tokens} {positions}",
    )
