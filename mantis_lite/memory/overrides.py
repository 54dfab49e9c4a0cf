"""What of a recipe could be changed so that a step takes less of a card, and what each change comes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..errors import RecipeError, SampleError
from ..models.family import Family
from ..recipe import Recipe
from ..recipe_file import make_recipe
from .estimate import Estimate, estimate
from .packs import Rows
from .step import Machine, Pack, machine_of

TILE = 2048
"""Tokens that an MLP sees at a time where that is to save memory."""

LOWER = {"1080p": "720p", "720p": "480p"}
"""The next smaller of Fuyu's sizes of a picture."""

SMALL = 224
"""Pixels of a side that pictures are not made smaller than."""


GPUS = 8
"""GPUs of a run over several, where it is not said how many: upstream's."""

OF_THE_MODEL: Any = {
    **dict.fromkeys(("task", "method", "trainable", "lora", "head"), True),
    "memory": {"quantize", "optimizer"},
}
"""What an estimate takes from a recipe beside what is in its Pack and Machine."""


@dataclass(frozen=True)
class Work:
    """A model, and the rows it is to be trained on, as far as memory goes; `seen` are the estimates made of them."""

    config: PreTrainedConfig
    family: Family
    image_processor: BaseImageProcessor
    rows: Rows
    seen: dict[tuple[str, Pack, Machine], Estimate] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Taken:
    """What a step with this pack takes of a card; whether it has several packs."""

    pack: Pack
    estimate: Estimate
    accumulates: bool


@dataclass(frozen=True)
class Override:
    """A change of the recipe, and what it comes to in bytes of the card."""

    words: str
    total: int


def taken(work: Work, recipe: Recipe) -> list[Taken]:
    """What the packs that may be the largest take, the most first. Raises SampleError as `rows.packs` does."""
    packs, accumulates = work.rows.packs(recipe)
    return sorted((_taken(work, recipe, pack, accumulates) for pack in packs), key=lambda each: -each.estimate.total)


def peak(work: Work, recipe: Recipe) -> Estimate | str:
    """What a step of the largest pack takes at most, or why that cannot be said."""
    if recipe.launch.sequence > 1:
        return "launch.sequence: estimates are of a GPU that holds whole rows"
    try:
        return taken(work, recipe)[0].estimate
    except (RecipeError, SampleError) as error:  # also of a picture that is gone meanwhile
        return str(error)


def taken_less(work: Work, recipe: Recipe, before: Recipe, known: list[Taken]) -> Taken:
    """The most that is taken under a recipe which saves memory against the one `before`, of which all is `known`.

    A pack that took less before than another does now need not be looked at.
    """
    if recipe.media != before.media or recipe.packing != before.packing:
        return taken(work, recipe)[0]
    worst: Taken | None = None
    for each in known:
        if worst is None or each.estimate.total > worst.estimate.total:
            now = _taken(work, recipe, each.pack, each.accumulates)
            worst = now if worst is None or now.estimate.total > worst.estimate.total else worst
    assert worst is not None
    return worst


def changed(recipe: Recipe, words: str) -> Recipe:
    """The recipe under one or more overrides, with blanks between. Raises RecipeError."""
    return make_recipe(recipe.model_dump(mode="json"), words.split(" "))


def best(work: Work, recipe: Recipe, known: list[Taken], count: int = 4) -> list[Override]:
    """The overrides that save most, each by itself, the best first; `known` is what is taken without them."""
    found = []
    for words in _candidates(work, recipe):
        try:
            other = changed(recipe, words)
            total = taken_less(work, other, recipe, known).estimate.total
        except (RecipeError, SampleError):
            continue  # against another setting, or a picture that cannot be had under it
        found.append(Override(words, total))
    saving = [override for override in found if override.total < known[0].estimate.total]
    return sorted(saving, key=lambda override: override.total)[:count]


def _taken(work: Work, recipe: Recipe, pack: Pack, accumulates: bool) -> Taken:
    machine = machine_of(recipe, accumulates)
    key = recipe.model_dump_json(include=OF_THE_MODEL), pack, machine
    if key not in work.seen:
        work.seen[key] = estimate(work.config, recipe, pack, machine, work.family)
    return Taken(pack, work.seen[key], accumulates)


def _candidates(work: Work, recipe: Recipe) -> Iterator[str]:
    """Overrides that may help this recipe."""
    if recipe.method == "full":
        whole = " launch.strategy=ddp" if recipe.parts_weights else ""  # what is in 4 bits is not parted
        yield "method=lora trainable=null"
        yield "memory.optimizer=adamw_bnb_8bit"
        yield "memory.optimizer=paged_adamw_8bit"
        yield f"method=qlora trainable=null{whole}"
    yield from shared_out(recipe)
    yield from exact(recipe)
    yield from in_4_bits(work, recipe)
    yield from offloaded(recipe)
    yield from shorter(work, recipe)
    if recipe.method != "full" and recipe.lora.r > 8:
        yield "lora.r=8"
    if recipe.trainable.projector not in (None, "frozen"):
        yield "trainable.projector=frozen"
    yield from _smaller_pictures(work, recipe)


def shared_out(recipe: Recipe) -> Iterator[str]:
    """Overrides that part among GPUs, or put on the host, what one GPU holds by itself."""
    if recipe.launch.size == 1 and recipe.method != "full":
        return
    if not recipe.parts_weights:
        yield "launch.strategy=zero3" + (f" launch.gpus={GPUS}" if recipe.launch.size == 1 else "")
    if recipe.strategy != "zero3_offload":
        yield "launch.strategy=zero3_offload"
    if recipe.sharded:
        yield f"launch.gpus={2 * (recipe.launch.gpus or 1)}"


def exact(recipe: Recipe) -> Iterator[str]:
    """Overrides that compute the same numbers, some of them twice."""
    if recipe.memory.checkpointing not in ("auto", "full"):
        yield "memory.checkpointing=full"
    if not recipe.memory.mlp_tile:
        yield f"memory.mlp_tile={TILE}"


def in_4_bits(work: Work, recipe: Recipe) -> Iterator[str]:
    """Overrides that hold frozen weights in 4 bits: the language model's, then every part's. Those are not parted."""
    if recipe.parts_weights:
        return
    if recipe.method == "lora" and recipe.lora.init != "pissa":
        yield "method=qlora" if recipe.memory.quantize is None else "method=qlora memory.quantize=null"
    elif recipe.method == "qlora":
        parts = [part for part in recipe.parts if part in work.family.parts and recipe.part(part) != "full"]
        if set(parts) > set(recipe.quantized):
            yield f"memory.quantize=[{','.join(parts)}]"


def offloaded(recipe: Recipe) -> Iterator[str]:
    """The override that keeps on the host what the backward pass needs."""
    if not recipe.memory.offload_activations:
        yield "memory.offload_activations=true"


def shorter(work: Work, recipe: Recipe) -> Iterator[str]:
    """The override that makes packs half as long, or as long as the longest sample."""
    length = max(recipe.packing.max_length // 2, work.rows.longest)
    if recipe.packing.enabled and length < recipe.packing.max_length:
        yield f"packing.max_length={length}"


def _smaller_pictures(work: Work, recipe: Recipe) -> Iterator[str]:
    """Overrides that show the model less: no quarters, pictures half as wide, half as many frames."""
    media = recipe.media
    if work.family.splits and media.image_splitting is not False:
        yield "media.image_splitting=false"
    cap = media.max_image_size
    if work.family.caps:
        if lower := LOWER.get(str(cap or "1080p")):
            yield f"media.max_image_size={lower}"
    elif (side := _side(work, recipe) // 2) >= SMALL:
        yield f"media.max_image_size={side}"
    if media.num_frames and media.num_frames > 1:
        yield f"media.num_frames={media.num_frames // 2}"
    if media.max_frames and media.max_frames > 1:
        yield f"media.max_frames={media.max_frames // 2}"


def _side(work: Work, recipe: Recipe) -> int:
    """The longest side that pictures have now, in pixels."""
    cap = recipe.media.max_image_size
    if work.family.scales:  # every picture is scaled to it
        return int(cap or work.image_processor.size["longest_edge"])
    return min(int(cap), work.rows.side) if cap else work.rows.side
