"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures in their own shape, and three rotary positions a token (M-RoPE).

Wang et al. 2024, https://arxiv.org/abs/2409.12191; upstream trains Qwen2-VL-7B.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL.Image import Resampling
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from ..data.template import QWEN2_VL, QWEN3_VL, Token
from ..data.vision import Pixels, Seen, Size, Vision, planes
from ..recipe import MediaRecipe
from .family import LLAMA_LAYERS, Family, Processing
from .levels import see_levels

BEGIN, PLACEHOLDER, END = Token("<|vision_start|>"), Token("<|image_pad|>"), Token("<|vision_end|>")


def vision(
    config: PreTrainedConfig, processor: BaseImageProcessor, media: MediaRecipe, vocabulary: Collection[str]
) -> Vision:
    """How pictures enter: scaled to whole windows of patches within the processor's bounds, a token a window."""
    merge = config.vision_config.spatial_merge_size
    each, side, times = merge**2, processor.patch_size, processor.temporal_patch_size
    resample = Resampling(processor.resample)

    def scaled(size: Size) -> Size:
        bounds = processor.size["shortest_edge"], processor.size["longest_edge"]
        height, width = smart_resize(size[1], size[0], side * processor.merge_size, *bounds)
        return width, height

    def patches(size: Size) -> int:
        width, height = scaled(size)
        return (width // side) * (height // side)

    def pixels(picture: Seen) -> Pixels:
        size = scaled(picture.size)
        found = _windows(planes(picture.resize(size, resample)), side, processor.merge_size)
        grid = np.array([[1, size[1] // side, size[0] // side]], dtype=np.int64)
        return {"pixel_values": np.repeat(found, times, axis=2).reshape(len(found), -1), "image_grid_thw": grid}

    def own_positions(placeholders: np.ndarray, pictures: Sequence[Pixels]) -> np.ndarray:
        return positions(placeholders, [picture["image_grid_thw"][0] for picture in pictures], merge)

    return Vision(
        placeholder=PLACEHOLDER,
        tokens=lambda size: ((BEGIN, 1), (PLACEHOLDER, patches(size) // each), (END, 1)),
        patches=patches,
        enough=scaled,
        pixels=pixels,
        positions=own_positions,
        facts=f"qwen_vl {merge} {processor.patch_size} {processor.merge_size} {processor.size}",
    )


def _windows(image: np.ndarray, side: int, merge: int) -> np.ndarray:
    """An image (3, H, W) as patches (N, 3, 1, side * side), those of a window one after the other, row by row."""
    _, height, width = image.shape
    windows = (height // side // merge, merge, side, width // side // merge, merge, side)
    return image.reshape(3, *windows).transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, 1, side * side)


def positions(placeholders: np.ndarray, grids: Sequence[np.ndarray], merge: int) -> np.ndarray:
    """Time, height and width (3, T) of each token of a sample: a picture's tokens share a time and spread over both.

    `placeholders` (T,) says which tokens are pictures', `grids` each picture's (1, rows, columns) of patches. Text goes
    on behind a picture's longer side (Wang et al. 2024, section 2.1).
    """
    parts: list[np.ndarray] = []
    at = next_position = 0
    for _, rows, columns in (grid.tolist() for grid in grids):
        rows, columns = rows // merge, columns // merge
        start = at + int(placeholders[at:].argmax())
        parts.append(np.tile(np.arange(start - at) + next_position, (3, 1)))
        next_position += start - at
        spread = [np.zeros((rows, columns)), *np.indices((rows, columns))]
        parts.append(np.stack(spread).reshape(3, -1).astype(np.int64) + next_position)
        next_position += max(rows, columns)
        at = start + rows * columns
    parts.append(np.tile(np.arange(len(placeholders) - at) + next_position, (3, 1)))
    return np.concatenate(parts, axis=1)


def _processor(config: PreTrainedConfig, media: MediaRecipe) -> Processing:
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[config.model_type]
    return Processing({"processor_class": f"{name}Processor"}, {})


QWEN2 = Family(
    model_types=("qwen2_vl", "qwen2_5_vl"),
    templates=(QWEN2_VL,),
    parts={
        "language_model": ("model.language_model",),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "vision_tower": ("model.visual",),
    },
    targets={
        "language_model": LLAMA_LAYERS,
        "projector": ("0", "2", "linear_fc1", "linear_fc2"),
        "vision_tower": ("qkv", "proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj", "linear_fc1", "linear_fc2"),
    },
    processor=_processor,
    vision=vision,
    adapt=partial(see_levels, colours=-2),
    hub=(QWEN2_VL,),
    tower_layers=lambda config: r"blocks\.\d+\.",
)

QWEN3 = replace(QWEN2, model_types=("qwen3_vl",), templates=(QWEN3_VL,), hub=(QWEN3_VL,))
