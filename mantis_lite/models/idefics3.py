"""Idefics3 and SmolVLM: pictures in tiles and a whole view, each tile 16 (or 9, ...) patches to a token.

Idefics3-8B-Llama3 (Laurençon et al. 2024, https://arxiv.org/abs/2408.12637), which upstream trains too, and SmolVLM
(Marafioti et al. 2025, https://arxiv.org/abs/2504.05299).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil
from types import MethodType
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.template import IDEFICS_3, IDEFICS_3_HUB, SMOLVLM, Token
from ..data.vision import Pixels, Runs, Seen, Size, Vision, bounded, lay_end_to_end, planes
from ..recipe import MediaRecipe
from .family import LLAMA_LAYERS, SIGLIP_LAYERS, Family, Processing, Projection
from .tower import see_a_few_at_a_time

FAKE, PLACEHOLDER, WHOLE = Token("<fake_token_around_image>"), Token("<image>"), Token("<global-img>")
LIMIT = 4096  # px: the processors' own bound, whatever their settings


def vision(
    config: PreTrainedConfig, processor: BaseImageProcessor, media: MediaRecipe, vocabulary: Collection[str]
) -> Vision:
    """How pictures enter: scaled to the longest side, cut into tiles, with a view of the whole behind them.

    `media.max_image_size` is the longest side before tiling, and so the dial of tokens. Without
    `media.image_splitting` a picture is one view; left out, the checkpoint's own setting holds.
    """
    tile = processor.max_image_size["longest_edge"]
    longest = int(media.max_image_size or processor.size["longest_edge"])
    splitting = processor.do_image_splitting if media.image_splitting is None else media.image_splitting
    tower = config.vision_config
    positions = (tower.image_size // tower.patch_size) ** 2
    each = positions // config.scale_factor**2
    resample = Resampling(processor.resample)

    def tokens(size: Size) -> Runs:
        columns, rows = _tiles(size, longest, tile) if splitting else (0, 0)
        view = ((FAKE, 1), (WHOLE, 1), (PLACEHOLDER, each), (FAKE, 1))
        if not rows:
            return view
        runs: list[tuple[str, int]] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                runs += [(FAKE, 1), (Token(f"<row_{row}_col_{column}>"), 1), (PLACEHOLDER, each)]
            runs.append(("\n" if row < rows else "\n\n", 1))
        return (*runs, *view)

    def patches(size: Size) -> int:
        columns, rows = _tiles(size, longest, tile) if splitting else (0, 0)
        return (columns * rows + 1) * positions

    def pixels(picture: Seen) -> Pixels:
        """Scaled by its longest side, then to whole tiles, and from these to the view of the whole, as upstream."""
        scaled = picture.resize(_longest(picture.size, longest), resample)
        if not splitting:
            return {"pixel_values": planes(scaled.resize((tile, tile), resample))[None]}
        width, height = _whole_tiles(scaled.size, tile)
        scaled = scaled.resize((width, height), resample)
        whole = planes(scaled.resize((tile, tile), resample))[None]
        if (width, height) == (tile, tile):
            return {"pixel_values": whole}
        tiles = planes(scaled).reshape(3, height // tile, tile, width // tile, tile).transpose(1, 3, 0, 2, 4)
        return {"pixel_values": np.concatenate([tiles.reshape(-1, 3, tile, tile), whole])}

    def enough(size: Size) -> Size:
        scaled = _longest(size, longest)
        return scaled if splitting else (max(scaled[0], tile), max(scaled[1], tile))

    def batch(pictures: Sequence[Pixels]) -> dict[str, Any]:
        return {"pixel_values": lay_end_to_end(pictures)["pixel_values"][None]}

    return Vision(
        placeholder=PLACEHOLDER,
        tokens=tokens,
        patches=patches,
        enough=enough,
        pixels=pixels,
        batch=batch,
        facts=f"idefics3 {each} {positions} {tile} {longest} {splitting}",
    )


def _tiles(size: Size, longest: int, tile: int) -> Size:
    """Columns and rows of tiles of a picture; none where it is a single view."""
    width, height = _whole_tiles(_longest(size, longest), tile)
    return (width // tile, height // tile) if width > tile or height > tile else (0, 0)


def _longest(size: Size, longest: int) -> Size:
    """A size scaled to its longest side, the other one even, by the processors' arithmetic."""
    width, height = size
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return bounded((max(width, 1), max(height, 1)), LIMIT, 1)


def _whole_tiles(size: Size, tile: int) -> Size:
    """A size enlarged to whole tiles, by the processors' arithmetic."""
    width, height = size
    ratio = width / height
    if width >= height:
        width = ceil(width / tile) * tile
        height = ceil(int(width / ratio) / tile) * tile
    else:
        height = ceil(height / tile) * tile
        width = ceil(int(height * ratio) / tile) * tile
    return width, height


def _processor(config: PreTrainedConfig, media: MediaRecipe) -> Processing:
    tower = config.vision_config
    each = (tower.image_size // tower.patch_size) ** 2 // config.scale_factor**2
    name = "SmolVLMProcessor" if config.model_type == "smolvlm" else "Idefics3Processor"
    images: dict[str, Any] = {}
    if media.image_splitting is not None:
        images["do_image_splitting"] = media.image_splitting
    if media.max_image_size:
        images["size"] = {"longest_edge": int(media.max_image_size)}
    return Processing({"processor_class": name, "image_seq_len": each}, images)


def _adapt(model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """A few tiles at a time; and before transformers 5.23, SmolVLM's features could not be of less bits than words."""
    see_a_few_at_a_time(model, processor, 1, "connector")
    if hasattr(model.model, "inputs_merger"):
        model.model.inputs_merger = MethodType(_merged, model.model)


def _merged(
    self: Any, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_hidden_states: torch.Tensor
) -> torch.Tensor:
    return type(self).inputs_merger(self, input_ids, inputs_embeds, image_hidden_states.to(inputs_embeds.dtype))


IDEFICS3 = Family(
    model_types=("idefics3", "smolvlm"),
    templates=(IDEFICS_3, SMOLVLM),
    parts={
        "language_model": ("model.text_model",),
        "projector": ("model.connector",),
        "vision_tower": ("model.vision_model",),
    },
    targets={
        "language_model": LLAMA_LAYERS,
        "projector": ("proj",),
        "vision_tower": SIGLIP_LAYERS,
    },
    processor=_processor,
    vision=vision,
    hub=(IDEFICS_3_HUB, SMOLVLM),
    splits=True,
    scales=True,
    adapt=_adapt,
    projection=Projection(
        rows=lambda vision, size: vision.patches(size), run=lambda model, hidden: model.connector(hidden)
    ),
)
