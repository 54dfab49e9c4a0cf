"""Pictures travel as bytes; what the published processor makes of each level is looked up where the model is."""

from __future__ import annotations

from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

LEVELS = 256


def levels_of(processor: BaseImageProcessor) -> Tensor:
    """What a published processor makes of each level of red, green and blue, by its own arithmetic: (3, 256) float32.

    A picture's numbers are these and no others, as the processors scale pictures while they are bytes.
    """
    found = np.tile(np.arange(LEVELS, dtype=np.uint8), (3, 1, 1))
    if processor.do_rescale:
        found = processor.rescale(found, processor.rescale_factor)
    if processor.do_normalize:
        found = processor.normalize(found, processor.image_mean, processor.image_std)
    return torch.from_numpy(found[:, 0].astype(np.float32))


def look_up(pixels: Tensor, levels: Tensor, colours: int = -3) -> Tensor:
    """Bytes, whose dimension `colours` is red, green and blue, as `levels` (3, 256) have them.

    What is in floating point, as a plain client's processor makes it, stays as it is.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    levels = levels.to(pixels.device)
    shape = [1] * pixels.dim()
    shape[colours] = len(levels)
    first = LEVELS * torch.arange(len(levels), dtype=torch.int32, device=pixels.device).view(shape)
    places = pixels.to(torch.int32, memory_format=torch.contiguous_format).add_(first)
    return levels.flatten().index_select(0, places.flatten()).view(pixels.shape)


def look_up_patches(pixels: Tensor, levels: Tensor, colours: int) -> Tensor:
    """As `look_up`, of patches (.., 3 * n) whose numbers go by colour (`colours` -2), or by place (-1)."""
    split = (len(levels), -1) if colours == -2 else (-1, len(levels))
    return look_up(pixels.unflatten(-1, split), levels, colours).flatten(-2)


def see_levels(model: PreTrainedModel, processor: BaseImageProcessor, colours: int) -> None:
    """Let a loaded model take patches as bytes for its pixel_values, beside the floating point of the stock layout.

    `colours` is as in `look_up_patches`.
    """
    seeing: Any = model.model
    features = partial(_features, levels=levels_of(processor), colours=colours)
    stock = type(seeing).get_image_features
    seeing.get_image_features = MethodType(update_wrapper(features, stock), seeing)  # generate() asks what it takes


def _features(self: Any, pixel_values: Tensor, *args: Any, levels: Tensor, colours: int, **kwargs: Any) -> Any:
    if pixel_values.dtype == torch.uint8:
        pixel_values = look_up_patches(pixel_values, levels, colours).to(self.dtype)
    return type(self).get_image_features(self, pixel_values, *args, **kwargs)
