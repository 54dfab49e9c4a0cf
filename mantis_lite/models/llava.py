"""The LLaVA family as Mantis trained it: a CLIP or SigLIP tower, a two-layer projector and a Llama.

Mantis-8B-siglip-llama3, Mantis-8B-clip-llama3 and Mantis-llava-7b (Jiang et al. 2024, https://arxiv.org/abs/2405.01483).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
import PIL.Image
import torch
from PIL.Image import Resampling
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..data.template import LLAMA_3, MLLAVA_V1, Token, Wrap
from ..data.vision import Pixels, Seen, Size, Vision, all_of_it, planes
from ..errors import RecipeError
from ..recipe import MediaRecipe
from .family import LLAMA_LAYERS, SIGLIP_LAYERS, Family, Processing, Projection
from .levels import levels_of, look_up
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
    known = _is_known(processor)
    if not known:
        _refuse_other_numbers(processor)

    def pixels(picture: Seen) -> Pixels:
        return {"pixel_values": (_cropped if known else _by_processor)(picture, processor)[None]}

    return Vision(
        placeholder=placeholder,
        wrap=Wrap(before=lambda j: f"(image {j}: <Image>", after=lambda j: "</Image>)"),
        tokens=lambda size: ((placeholder, tokens),),
        patches=lambda size: positions,
        enough=partial(_scaled, processor=processor) if known else all_of_it,
        pixels=pixels,
        facts=f"llava {tokens} {positions}",
    )


def _is_known(processor: BaseImageProcessor) -> bool:
    """Whether it scales a picture, and then cuts out its middle, as CLIP's and SigLIP's do."""
    sizes = ({"shortest_edge"}, {"height", "width"})
    kind = type(processor).__name__.removesuffix("Pil")
    if kind not in ("CLIPImageProcessor", "SiglipImageProcessor") or set(dict(processor.size)) not in sizes:
        return False
    if processor.do_pad or not processor.do_resize:
        return False
    if not processor.do_center_crop:
        return True
    width, height = _scaled((1, 1), processor)
    return processor.crop_size["width"] <= width and processor.crop_size["height"] <= height


def _scaled(size: Size, processor: BaseImageProcessor) -> Size:
    """The size to which a known processor scales a picture."""
    if "width" in processor.size:
        return processor.size["width"], processor.size["height"]
    short, (width, height) = processor.size["shortest_edge"], size
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def _cropped(picture: Seen, processor: BaseImageProcessor) -> np.ndarray:
    """The bytes (3, H, W) that a known processor makes of a picture before they are numbers."""
    scaled = picture.resize(_scaled(picture.size, processor), Resampling(processor.resample))
    if processor.do_center_crop:
        width, height = processor.crop_size["width"], processor.crop_size["height"]
        left, top = (scaled.size[0] - width) // 2, (scaled.size[1] - height) // 2
        scaled = scaled.crop((left, top, left + width, top + height))
    return planes(scaled)


def _by_processor(picture: Seen, processor: BaseImageProcessor) -> np.ndarray:
    """The same of another processor, by itself."""
    made = processor([np.asarray(picture)], do_rescale=False, do_normalize=False, input_data_format="channels_last")
    return np.asarray(made["pixel_values"][0])


def _refuse_other_numbers(processor: BaseImageProcessor) -> None:
    """Raise RecipeError where a processor's numbers are not those of bytes, as where it fills up what it has scaled."""
    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    expected = processor([picture], input_data_format="channels_last")["pixel_values"][0]
    found = _by_processor(PIL.Image.fromarray(picture), processor)
    numbers = look_up(torch.from_numpy(found), levels_of(processor)).numpy()
    if found.dtype != np.uint8 or not np.array_equal(numbers, expected):
        name = type(processor).__name__
        raise RecipeError(
            f"model: its pictures are prepared by {name}, whose numbers are not those of 256 levels a colour\n"
            "  Take a LLaVA whose preprocessor_config.json names CLIPImageProcessor or SiglipImageProcessor."
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
    adapt=partial(see_a_few_at_a_time, dimension=0, projector="multi_modal_projector"),
    projection=Projection(
        rows=lambda vision, size: vision.placeholders(size),
        run=lambda model, hidden: model.multi_modal_projector(hidden),
    ),
)
