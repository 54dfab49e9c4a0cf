"""Fuyu: no vision tower, each patch of 30 x 30 pixels is a token of a Persimmon; here with several pictures.

Mantis-8B-Fuyu and fuyu-8b (https://www.adept.ai/blog/fuyu-8b). The processor of transformers takes one picture a text,
so pictures are laid out here as upstream's own processor does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from inspect import signature
from math import ceil
from typing import Any

import numpy as np
from PIL.Image import Resampling
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..data.template import MFUYU_V1, Token, Wrap
from ..data.vision import Pixels, Runs, Seen, Size, Vision, lay_end_to_end
from ..recipe import MediaRecipe
from .family import Family, Processing
from .levels import see_levels

PLACEHOLDER, NEW_LINE = Token("|SPEAKER|"), Token("|NEWLINE|")
BEGIN, END = Token("|IMAGE|"), Token("|ENDOFIMAGE|")

THETA = 25_000.0
"""Persimmon's rotary base (transformers' default until 5.0)."""

CAPS = {"480p": (854, 480), "720p": (1280, 720), "1080p": (1920, 1080)}


def vision(
    config: PreTrainedConfig, processor: BaseImageProcessor, media: MediaRecipe, vocabulary: Collection[str]
) -> Vision:
    """How pictures enter: in rows of patches, each row behind a new-line token, "image 0: " before the first picture.

    A picture larger than the cap, `media.max_image_size` or else the checkpoint's, is scaled down to it; both are
    rounded up to whole patches. Upstream gave its vocabulary two tokens to put around a picture; fuyu-8b itself knows
    no such tokens, and was trained without.
    """
    begin, end = ([(token, 1)] if token in vocabulary else [] for token in (BEGIN, END))
    side = config.patch_size
    widest, highest = CAPS.get(str(media.max_image_size), (processor.size["width"], processor.size["height"]))
    cap = ceil(widest / side) * side, ceil(highest / side) * side

    def grid(size: Size) -> Size:
        width, height = _scaled(size, cap)
        return ceil(width / side), ceil(height / side)

    def tokens(size: Size) -> Runs:
        columns, rows = grid(size)
        return (*begin, *((PLACEHOLDER, columns), (NEW_LINE, 1)) * rows, *end)

    def patches(size: Size) -> int:
        columns, rows = grid(size)
        return columns * rows

    def enough(size: Size) -> Size:
        return _scaled(size, cap)

    def pixels(picture: Seen) -> Pixels:
        scaled = picture.resize(enough(picture.size), Resampling.BILINEAR)
        return {"patches": _patches(np.asarray(scaled), side)}

    from transformers import FuyuForCausalLM  # here, as only a Fuyu needs its class, which takes time to load

    # transformers before 5.23 takes the patches by another name, and ignores this one without an error.
    name = "pixel_values" if "pixel_values" in signature(FuyuForCausalLM.forward).parameters else "image_patches"

    def batch(pictures: Sequence[Pixels]) -> dict[str, Any]:
        return {name: lay_end_to_end(pictures)["patches"][None]}

    return Vision(
        placeholder=PLACEHOLDER,
        wrap=Wrap(before=lambda j: f"image {j - 1}: ", chunk=Token("<s>")),
        tokens=tokens,
        patches=patches,
        enough=enough,
        pixels=pixels,
        batch=batch,
        facts=f"fuyu {side} {cap} {begin} {end}",
    )


def _scaled(size: Size, cap: Size) -> Size:
    """A size within the cap, in its own shape."""
    width, height = size
    if width <= cap[0] and height <= cap[1]:
        return size
    scale = min(cap[1] / height, cap[0] / width)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _patches(image: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W, 3) of bytes as patches (N, side * side * 3), row by row, filled up below and right.

    The filling is a level of 1, as the original's: it pads before it scales.
    """
    height, width, colours = image.shape
    rows, columns = ceil(height / side), ceil(width / side)
    whole = np.ones((rows * side, columns * side, colours), dtype=np.uint8)
    whole[:height, :width] = image
    return whole.reshape(rows, side, columns, side, colours).swapaxes(1, 2).reshape(rows * columns, -1)


def _processor(config: PreTrainedConfig, media: MediaRecipe) -> Processing:
    """The processor of transformers takes one picture a text, and no chat template: it is no client of several."""
    cap = CAPS.get(str(media.max_image_size))
    return Processing(
        {"processor_class": "FuyuProcessor"}, {"size": {"height": cap[1], "width": cap[0]}} if cap else {}
    )


def _state_theta(config: dict[str, Any]) -> str | None:
    """The rotary base as trained: left out of a published text_config as a default, which has since become 10,000."""
    text = config.get("text_config")
    if text is None or "rope_theta" in text or "rope_parameters" in text:
        return None
    text["rope_theta"] = config.get("rope_theta", THETA)
    return (
        f"the checkpoint's text_config leaves rope_theta out; {text['rope_theta']:,.0f} is used, as it was trained, "
        "where transformers alone would take 10,000: state it in the config.json wherever else the model is loaded"
    )


FUYU = Family(
    model_types=("fuyu",),
    templates=(MFUYU_V1,),
    parts={"language_model": ("model.language_model",), "projector": ("model.vision_embed_tokens",)},
    targets={
        "language_model": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        "projector": ("vision_embed_tokens",),
    },
    processor=_processor,
    vision=vision,
    adapt=partial(see_levels, colours=-1),
    caps=CAPS,
    mend=_state_theta,
)
