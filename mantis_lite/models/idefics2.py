"""Idefics2: a SigLIP tower that takes each picture in its own shape, a perceiver of 64 latents and a Mistral.

Mantis-8B-Idefics2 and idefics2-8b (Laurençon et al. 2024, https://arxiv.org/abs/2405.02246).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from math import ceil
from types import MethodType
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..data.template import IDEFICS_2, IDEFICS_2_HUB, Token, Wrap
from ..data.vision import Pixels, Seen, Size, Vision, bounded, planes
from ..recipe import MediaRecipe
from .family import LLAMA_LAYERS, SIGLIP_LAYERS, Family, Processing, Projection
from .levels import levels_of, look_up
from .tower import at_a_time, projected_at_a_time

Box = tuple[int, int, int, int]

FAKE, PLACEHOLDER = Token("<fake_token_around_image>"), Token("<image>")


def vision(
    config: PreTrainedConfig, processor: BaseImageProcessor, media: MediaRecipe, vocabulary: Collection[str]
) -> Vision:
    """How pictures enter: each in its own shape, its sides kept within the processor's bounds.

    64 tokens behind a token that begins a picture, and the same token once behind the last of adjacent pictures.
    `media.image_splitting` adds a picture's four quarters before it, so five times the tokens; upstream left it off.
    """
    patch, latents = config.vision_config.patch_size, config.perceiver_config.resampler_n_latents
    splitting, resample = bool(media.image_splitting), Resampling(processor.resample)
    bounds = processor.size["longest_edge"], processor.size["shortest_edge"]

    def views(size: Size) -> list[tuple[int, int]]:
        sizes = [bounded(_size(box), *bounds) for box in _boxes(size, splitting)]
        return [(height // patch, width // patch) for width, height in sizes]

    def pixels(picture: Seen) -> Pixels:
        seen = [picture.crop(box) for box in _boxes(picture.size, splitting)]
        scaled = [view.resize(bounded(view.size, *bounds), resample) for view in seen]
        return {f"view {number}": planes(view) for number, view in enumerate(scaled)}

    def enough(size: Size) -> Size:
        boxes = _boxes(size, splitting)
        scale = max(to / of for box in boxes for to, of in zip(bounded(_size(box), *bounds), _size(box), strict=True))
        return ceil(size[0] * scale), ceil(size[1] * scale)

    def batch(pictures: Sequence[Pixels]) -> dict[str, Any]:
        return {"pixel_values": by_shape([view for picture in pictures for view in picture.values()], patch)}

    runs = ((FAKE, 1), (PLACEHOLDER, latents)) * (5 if splitting else 1)
    return Vision(
        placeholder=PLACEHOLDER,
        wrap=Wrap(close=FAKE),
        tokens=lambda size: runs,
        patches=lambda size: sum(rows * columns for rows, columns in views(size)),
        views=views,
        enough=enough,
        pixels=pixels,
        batch=batch,
        facts=f"idefics2 {latents} {patch} {splitting} {processor.size}",
    )


def by_shape(views: Sequence[np.ndarray], patch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures (3, H, W) of like shape together: places (N,) in reading order and bytes (N, 3, H', W') of each group.

    The stock layout pads every picture of a batch to the largest one. Pictures keep their shapes here, so most of that
    would be padding, and a mask over it keeps the tower's attention off the flash kernel. A group has at most
    the patches of `at_a_time`, or one picture. What is left over beyond whole patches is cut, as the tower's
    convolution would.
    """
    places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, view in enumerate(views):
        places[tuple(side // patch for side in view.shape[-2:])].append(place)
    groups = []
    for (rows, columns), members in places.items():
        most = at_a_time(rows * columns)
        for group in (members[at : at + most] for at in range(0, len(members), most)):
            pixels = np.stack([views[at][:, : rows * patch, : columns * patch] for at in group])
            groups.append((torch.tensor(group), torch.from_numpy(pixels)))
    return groups


def _read_by_shape(model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Let a loaded model take what `by_shape` gives as its pixel_values, beside the stock layout."""
    model.model.get_image_features = MethodType(partial(_features, levels=levels_of(processor)), model.model)


def _features(self: Any, pixel_values: Any, *args: Any, levels: torch.Tensor, **kwargs: Any) -> Any:
    """What the tower and the connector make of pictures, a shape at a time; in reading order."""
    if isinstance(pixel_values, torch.Tensor):
        assert pixel_values.is_floating_point(), "what the stock layout is filled up with is no level"
        return type(self).get_image_features(self, pixel_values, *args, **kwargs)
    places, found = [], []
    for members, pictures in pixel_values:
        pictures = look_up(pictures, levels).to(self.dtype)
        rows, columns = (side // self.vision_model.config.patch_size for side in pictures.shape[-2:])
        whole = torch.ones(len(pictures), rows, columns, dtype=torch.bool, device=pictures.device)
        hidden = self.vision_model(pixel_values=pictures, patch_attention_mask=whole).last_hidden_state
        found.append(_connected(self, hidden))
        places.append(members)
    return BaseModelOutputWithPooling(pooler_output=torch.cat(found)[torch.cat(places).argsort()])


def _connected(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What the connector makes of the tower's output for pictures of a shape: (N, P, W) -> (N, latents, H).

    A few at a time, and again in the backward pass where layers are: its wide layers would keep 4 x 14,336 numbers a
    patch.
    """
    again = model.training and model.text_model.gradient_checkpointing
    found = []
    for few in hidden.split(projected_at_a_time(hidden.shape[1])):
        whole = torch.ones(few.shape[:2], dtype=torch.bool, device=few.device)
        if again:
            found.append(checkpoint(model.connector, few, whole, use_reentrant=False))
        else:
            found.append(model.connector(few, attention_mask=whole))
    return torch.cat(found)


def _processor(config: PreTrainedConfig, media: MediaRecipe) -> Processing:
    """transformers' own default is to split."""
    latents = config.perceiver_config.resampler_n_latents
    splitting = bool(media.image_splitting)
    return Processing(
        {"processor_class": "Idefics2Processor", "image_seq_len": latents}, {"do_image_splitting": splitting}
    )


def _boxes(size: Size, splitting: bool) -> list[Box]:
    """Left, top, right and bottom of a picture's quarters, where it is split, and of itself."""
    width, height = size
    whole = (0, 0, width, height)
    if not splitting:
        return [whole]
    x, y = width // 2, height // 2
    return [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height), whole]


def _size(box: Box) -> Size:
    left, top, right, bottom = box
    return right - left, bottom - top


IDEFICS2 = Family(
    model_types=("idefics2",),
    templates=(IDEFICS_2,),
    parts={
        "language_model": ("model.text_model",),
        "projector": ("model.connector",),
        "vision_tower": ("model.vision_model",),
    },
    targets={
        "language_model": LLAMA_LAYERS,
        "projector": LLAMA_LAYERS,
        "vision_tower": SIGLIP_LAYERS,
    },
    processor=_processor,
    vision=vision,
    hub=(IDEFICS_2_HUB,),
    splits=True,
    adapt=_read_by_shape,
    projection=Projection(rows=lambda vision, size: vision.patches(size), run=_connected),
)
