"""What a vision cache may keep: of which parts, of which pictures, and how large it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..data import media
from ..data.encode import Encoder
from ..data.prepare import Samples
from ..data.sample import Image
from ..data.vision import Size, Vision
from ..errors import RecipeError, SampleError
from ..recipe import Part, Recipe
from .checkpoint import Checkpoint
from .family import Family
from .precision import weights_dtype

Plans = Sequence[tuple[Samples, Sequence[int]]]
"""Samples, and which of them are shown."""


class Place(NamedTuple):
    """Where a picture is shown first: in which plan, which sample, as which of its pictures; and its size in pixels."""

    plan: int
    sample: int
    picture: int
    size: Size


def trained_parts(recipe: Recipe) -> set[Part]:
    """The parts that learn by what the recipe says of them."""
    return {part for part, how in recipe.parts.items() if how != "frozen"}


def projects(family: Family, kind: str, trained: Collection[str]) -> bool:
    """Whether the projector runs in training, on what the tower gave; else what it made is kept.

    Raises RecipeError where a model of this kind, with these parts trained, has nothing that could be kept.
    """
    remedy = "or leave memory.vision_cache out."
    if "vision_tower" not in family.parts:
        raise RecipeError(f"memory.vision_cache: {kind} has no vision tower, so nothing to keep\n  Leave it out.")
    if "vision_tower" in trained:
        found = "the vision tower trains, so what it makes of a picture changes"
        raise RecipeError(f"memory.vision_cache: {found}\n  Set trainable.vision_tower=frozen, {remedy}")
    if "projector" not in trained:
        return False
    if family.projection is None:
        found = f"the projector trains, and that of {kind} is one with its tower"
        raise RecipeError(f"memory.vision_cache: {found}\n  Set trainable.projector=frozen, {remedy}")
    return True


def shown(
    plans: Plans, encoder: Encoder, key: Callable[[Image], Hashable], broken: Callable[[SampleError], None]
) -> dict[Any, Place]:
    """The different pictures of all plans, by `key`, and where each is shown first; `broken` is told of bad rows."""
    found: dict[Any, Place] = {}
    for number, (samples, indices) in enumerate(plans):
        for index in indices:
            try:
                sample = encoder.frames.lay_out(samples[index])
                for at, image in enumerate(sample.images):
                    size = media.size(image, sample, encoder.max_image_size)
                    found.setdefault(key(image), Place(number, index, at, size))
            except SampleError as error:
                broken(error)
    return found


def feature_bytes(
    checkpoint: Checkpoint, recipe: Recipe, vision: Vision, trained: Collection[str]
) -> Callable[[Size], int]:
    """What the features of a picture of a size take, in bytes, without what a file adds in front of them.

    Raises RecipeError as `projects` does.
    """
    family, config, each = checkpoint.family, checkpoint.config, weights_dtype(recipe).itemsize
    if not projects(family, config.model_type, trained):
        return lambda size: vision.placeholders(size) * _output_width(config) * each
    assert family.projection
    rows = family.projection.rows
    return lambda size: rows(vision, size) * _tower_width(config) * each


def _output_width(config: PreTrainedConfig) -> int:
    """Numbers a placeholder: for the words' layer, and Qwen3-VL's for deeper ones."""
    deeper = getattr(config.vision_config, "deepstack_visual_indexes", ())
    return config.get_text_config().hidden_size * (1 + len(deeper))


def _tower_width(config: PreTrainedConfig) -> int:
    """Numbers a position of the tower, of each layer that is read."""
    layers = getattr(config, "vision_feature_layer", 0)
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
