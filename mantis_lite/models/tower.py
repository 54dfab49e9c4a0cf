"""Pictures through a vision tower and its projector a few at a time, whatever a pack holds."""

from __future__ import annotations

from functools import partial
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .levels import levels_of, look_up

TOWER_PATCHES = 16_384
"""What goes through a tower at a time: enough to fill a GPU, and a bound on memory."""

PROJECTOR_PATCHES = 4_096
"""What goes through a projector at a time that is wider than its tower: Idefics2's is twelve times as wide."""


def at_a_time(patches: int) -> int:
    """How many pictures of so many patches go through the tower together."""
    return max(1, TOWER_PATCHES // patches)


def projected_at_a_time(patches: int) -> int:
    """How many pictures of so many patches go through a wide projector together."""
    return max(1, PROJECTOR_PATCHES // patches)


def see_a_few_at_a_time(model: PreTrainedModel, processor: BaseImageProcessor, dimension: int, projector: str) -> None:
    """Let a loaded model take its pictures so, where they lie along this dimension of its pixel_values (.., 3, H, W).

    As bytes they are in floating point (`levels.py`) a few at a time, too.

    Where layers are computed again, so is the named projector: what it keeps is wider than what it makes.
    """
    seeing: Any = model.model
    vision = seeing.config.vision_config
    most = at_a_time((vision.image_size // vision.patch_size) ** 2)
    few = partial(_features, levels=levels_of(processor), dimension=dimension, most=most)
    seeing.get_image_features = MethodType(few, seeing)
    module = getattr(seeing, projector)
    module.forward, module.computed_again = MethodType(_projected, module), False  # models/activations.py sets it


def _projected(self: Any, hidden: Tensor) -> Tensor:
    stock = MethodType(type(self).forward, self)
    return checkpoint(stock, hidden, use_reentrant=False) if self.training and self.computed_again else stock(hidden)


def _features(
    self: Any, pixel_values: Tensor, *args: Any, levels: Tensor, dimension: int, most: int, **kwargs: Any
) -> Any:
    stock = type(self).get_image_features
    few = pixel_values.split(most, dim=dimension)
    parts = [stock(self, look_up(part, levels), *args, **kwargs) for part in few]
    if len(parts) == 1:
        return parts[0]
    found = [part.pooler_output for part in parts]
    lists = isinstance(found[0], list)  # transformers before 5.23 gives one tensor for some models
    return BaseModelOutputWithPooling(pooler_output=list(chain.from_iterable(found)) if lists else torch.cat(found))
