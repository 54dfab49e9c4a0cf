"""Whether a run fits a card, found without a GPU, without weights and without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig

from ..data import media
from ..data.dataset import Schedule, schedule
from ..data.encode import Encoder
from ..data.prepare import Samples, prepare
from ..data.vision import Size, Vision, bounded
from ..errors import RecipeError
from ..memory.bases import find_base
from ..memory.estimate import GIB, Estimate, estimate
from ..memory.rehearsal import Machine, Pack, grid
from ..models.activations import checkpointed_layers
from ..models.checkpoint import SMALL_FILES, open_checkpoint
from ..models.family import Family
from ..models.load import stated_head
from ..recipe import ModelRecipe, Recipe, load_recipe

CARDS = (8, 12, 16, 24, 48, 80)
"""Sizes of cards that are asked about where there is none, in the GiB that they are sold by."""

USABLE = 0.9897
"""How much of that a process can have: an H100 of 80 had 79.18 GiB (benchmarks/results/gpu_step_idefics2.json)."""

ASSUMED: Size = (640, 480)
"""The pictures of a pack that nothing is known of, in pixels."""

NEAR = 8
"""Packs of most patches whose pictures are looked at."""

SAMPLES, PICTURES = 4, 2.6
"""Samples of a pack that nothing is known of, and pictures of a sample: Mantis-Instruct's mean."""

UNSTATED = "unstated.json"
"""Stands for data where a recipe names none."""


@dataclass(frozen=True)
class Override:
    """A change of the recipe and what it comes to, in bytes of the card."""

    words: str
    total: int


@dataclass(frozen=True)
class Fit:
    """The estimate of a recipe's largest pack; `known` is what it stands on; `overrides` are the best, best first."""

    recipe: Recipe
    estimate: Estimate
    pack: Pack
    known: str
    cards: dict[float, bool]
    """Whether it fits, by a card's GiB."""
    overrides: list[Override]


@dataclass(frozen=True)
class _Model:
    config: PreTrainedConfig
    family: Family
    vision: Vision | None
    encoder: Encoder | None
    recipe: Recipe


def read(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe that need not say which data. Raises RecipeError."""
    return load_recipe(name, overrides, unstated=UNSTATED)


def fit(name: str, overrides: Sequence[str] = (), gpu: float | None = None) -> Fit:
    """Estimate a recipe's largest pack, for one card or all of CARDS. Raises RecipeError, and errors of the data."""
    recipe = read(name, overrides)
    packs, known, accumulates = _packs(recipe)
    found, pack = max(((_estimate(recipe, pack, accumulates), pack) for pack in packs), key=lambda pair: pair[0].total)
    sizes = [gpu] if gpu else _at_hand() or CARDS
    best = sorted(_tried(name, overrides, pack, known, accumulates), key=lambda other: other.total)
    cards = {size: found.total <= size * USABLE * GIB for size in sizes}
    return Fit(recipe, found, pack, known, cards, [other for other in best if other.total < found.total][:3])


def machine_of(recipe: Recipe, accumulates: bool) -> Machine:
    """The GPU that a recipe would run on, as far as memory goes."""
    memory = recipe.memory
    return Machine(
        checkpointed=checkpointed_layers(memory, gpu=True),
        mlp_tile=memory.mlp_tile,
        attention="segment" if memory.attention == "auto" else memory.attention,
        fused=memory.kernels == "liger",
        head="none" if recipe.task == "classify" else "fused",
        offload=memory.offload_activations,
        accumulates=accumulates,
    )


def packs_of(plan: Schedule, samples: Samples, encoder: Encoder) -> list[Pack]:
    """The packs that may be the largest: of most tokens, of most patches, of most pictures of one shape.

    Shapes are looked up in the NEAR packs of most patches: each is a header to be read.
    """
    totals = np.array([samples.lengths[pack].sum(0) for pack in plan.packs])
    usual, beside = float(totals[:, 1].mean()), min(plan.accumulation, len(plan.packs)) - 1
    found = {}
    for at in {int(totals[:, 0].argmax()), *totals[:, 1].argsort()[-NEAR:].tolist()}:
        pack = _pack(plan.packs[at], samples, encoder)
        found[at] = replace(pack, waiting=beside * usual / max(1, totals[at, 1]))
    ranks = (lambda p: p.tokens, lambda p: p.patches, lambda p: p.crowd)
    return list(dict.fromkeys(max(found.values(), key=rank) for rank in ranks))


def _pack(pack: Sequence[int], samples: Samples, encoder: Encoder) -> Pack:
    """Its tokens, and its pictures' patches by their headers. Every token that is no picture's counts as supervised."""
    tokens, shown, grids = samples.lengths[list(pack), 0], 0, []
    for index in pack:
        sample = encoder.frames.lay_out(samples[index])
        for image in sample.images:
            size = media.size(image, sample, encoder.max_image_size)
            shown += len(encoder.picture_ids(size))
            grids.append(grid(encoder.vision.patches(size), size))
    return Pack(int(tokens.sum()), int(tokens.max()), max(1, int(tokens.sum()) - shown), tuple(grids))


def _packs(recipe: Recipe) -> tuple[list[Pack], str, bool]:
    """The packs that may be the largest, what they are, and whether a step has several."""
    model = _model(recipe)
    if recipe.data.sources[0].path == UNSTATED or model.encoder is None:
        pack, words = assumed(recipe, model.vision)
        return [pack], words, pack.waiting > 0
    checkpoint = open_checkpoint(model.recipe.model)
    head = stated_head(checkpoint, recipe)
    prepared = prepare(recipe.data, recipe.packing, model.encoder, task=recipe.task, head=head)
    plan = schedule(prepared.train, recipe.packing, recipe.train)
    words = f"the largest of the data's {len(plan.packs):,} packs"
    return packs_of(plan, prepared.train, model.encoder), words, plan.accumulation > 1


def assumed(recipe: Recipe, vision: Vision | None) -> tuple[Pack, str]:
    """A full pack of as many pictures as there is room for; and what was assumed, in words."""
    tokens, cap = recipe.packing.max_length, recipe.media.max_image_size
    assert vision is not None
    size = bounded(ASSUMED, cap, 1) if isinstance(cap, int) else ASSUMED
    each = sum(count for _, count in vision.tokens(size))
    patches = vision.patches(size)
    count = tokens // each
    if recipe.packing.max_patches:
        count = min(count, recipe.packing.max_patches // patches)
    step = _packs_a_step(recipe)
    words = f"{tokens:,} tokens with {count:,} pictures of {size[0]} x {size[1]} px in it, {step} packs a step"
    waiting = (step - 1) * min(1.0, SAMPLES * PICTURES / max(1, count))
    views = (grid(patches, size),) * count
    return Pack(tokens, tokens, max(1, tokens - count * each), views, waiting), f"assumed: a full pack of {words}"


def _packs_a_step(recipe: Recipe) -> int:
    train = recipe.train
    if "samples_per_step" in train:
        return max(1, train["samples_per_step"] // SAMPLES)
    if "tokens_per_step" in train:
        return max(1, train["tokens_per_step"] // recipe.packing.max_length)
    return train.get("gradient_accumulation_steps", 1)


def _model(recipe: Recipe) -> _Model:
    """What is known of the model: its small files where they are at hand, else what comes with the package."""
    folder = _folder(recipe.model)
    if folder is not None:
        own = recipe.model_copy(update={"model": ModelRecipe(name=folder)})
        checkpoint = open_checkpoint(own.model)
        encoder = checkpoint.encoder(own)
        return _Model(checkpoint.config, checkpoint.family, encoder.vision, encoder, own)
    base = find_base(recipe.model.name)
    return _Model(base.config, base.family, base.vision(recipe.media), None, recipe)


def _folder(model: ModelRecipe) -> str | None:
    """Where a model's small files are on this machine."""
    if model.name == "tiny" or Path(model.name).is_dir():
        return model.name
    try:
        return snapshot_download(model.name, revision=model.revision, allow_patterns=SMALL_FILES, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _estimate(recipe: Recipe, pack: Pack, accumulates: bool) -> Estimate:
    model = _model(recipe)
    return estimate(model.config, recipe, pack, machine_of(recipe, accumulates), model.family)


def _at_hand() -> tuple[float, ...]:
    """The GiB of the card in this machine, as sold."""
    if not torch.cuda.is_available():
        return ()
    return (round(torch.cuda.get_device_properties(0).total_memory / GIB / USABLE),)


def _tried(name: str, overrides: Sequence[str], pack: Pack, known: str, accumulates: bool) -> Iterator[Override]:
    """Overrides that might save memory, each by itself, with what they come to."""
    before = read(name, overrides)
    for words in _candidates(before):
        try:
            recipe = read(name, [*overrides, *words.split(" ")])
        except RecipeError:
            continue  # against another of the recipe's settings
        if recipe == before:
            continue
        if recipe.media != before.media or recipe.packing != before.packing:
            if known.startswith("assumed"):
                changed, _ = assumed(recipe, _model(recipe).vision)
            else:
                changed = _shortened(pack, recipe.packing.max_length)
        else:
            changed = pack
        yield Override(words, _estimate(recipe, changed, accumulates).total)


def _shortened(pack: Pack, tokens: int) -> Pack:
    """A pack of the same kind with fewer tokens, and as large a share of its pictures."""
    share = min(1.0, tokens / pack.tokens)
    return replace(
        pack,
        tokens=int(pack.tokens * share),
        longest=min(pack.longest, int(pack.tokens * share)),
        supervised=max(1, int(pack.supervised * share)),
        grids=pack.grids[: int(len(pack.grids) * share)],
    )


def _candidates(recipe: Recipe) -> Iterator[str]:
    """Overrides that may help this recipe, the mildest first."""
    memory = recipe.memory
    if recipe.method == "full":
        yield "method=lora trainable=null"
        yield "memory.optimizer=adamw_bnb_8bit"
        yield "memory.optimizer=paged_adamw_8bit"
    if recipe.method != "qlora":
        yield "method=qlora trainable=null" if recipe.method == "full" else "method=qlora"
    elif len(recipe.quantized) < 3:
        parts = [part for part in recipe.parts if recipe.part(part) != "full"]
        yield f"memory.quantize=[{','.join(parts)}]"
    if memory.checkpointing not in ("auto", "full"):
        yield "memory.checkpointing=full"
    if not memory.mlp_tile:
        yield "memory.mlp_tile=1024"
    if not memory.offload_activations:
        yield "memory.offload_activations=true"
    if recipe.packing.enabled and recipe.packing.max_length > 1024:
        yield f"packing.max_length={recipe.packing.max_length // 2}"
    if recipe.method != "full" and recipe.lora.r > 8:
        yield "lora.r=8"
    if recipe.trainable.projector not in (None, "frozen"):
        yield "trainable.projector=frozen"
    if recipe.media.image_splitting:
        yield "media.image_splitting=false"
