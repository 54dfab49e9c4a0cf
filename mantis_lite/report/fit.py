"""Whether a run fits a card, found without a GPU, without weights and without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from ..data.prepare import prepare
from ..data.schedule import schedule
from ..errors import RecipeError
from ..memory.bases import find_base
from ..memory.card import card_at_hand, card_of
from ..memory.choose import Choice, choose
from ..memory.estimate import GIB, Estimate
from ..memory.overrides import GPUS, Override, Work, best, taken
from ..memory.packs import Assumed, Planned
from ..memory.step import Pack
from ..models.assemble import open_model
from ..models.cacheable import projects, trained_parts
from ..models.checkpoint import SMALL_FILES, Checkpoint
from ..models.halves import named
from ..models.head_config import stated_head
from ..models.vision_cache import require_encoder_outputs
from ..recipe import ModelRecipe, Recipe
from ..recipe_file import load_recipe

CARDS = (8, 12, 16, 24, 48, 80)
"""Sizes of cards that are asked about where there is none, in the GiB that they are sold by."""

UNSTATED = "unstated.json"
"""Stands for data where a recipe names none."""


@dataclass(frozen=True)
class Fit:
    """The estimate of a recipe's largest pack; `known` is what it stands on; `overrides` are the best, best first.

    With memory.fit=auto it is that of the recipe as it was picked for the card, of which `choice` tells.
    """

    recipe: Recipe
    estimate: Estimate
    pack: Pack
    known: str
    cards: dict[float, bool]
    """Whether it fits, by a card's GiB."""
    overrides: list[Override]
    choice: Choice | None = None


def read(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe that need not say which data. Raises RecipeError."""
    return load_recipe(name, overrides, unstated=UNSTATED)


def fit(name: str, overrides: Sequence[str] = (), gpu: float | None = None) -> Fit:
    """Estimate a recipe's largest pack, for one card or all of CARDS. Raises RecipeError, and errors of the data."""
    recipe, assumed = with_gpus(read(name, overrides), gpu)
    if recipe.launch.sequence > 1:
        raise RecipeError("launch.sequence: estimates are of a GPU that holds whole rows\n  Leave it out to have that.")
    at_hand = card_of(gpu) if gpu else card_at_hand()
    if recipe.memory.fit == "auto" and at_hand is None:
        raise RecipeError("memory.fit: auto picks for a card, and there is none here\n  Name one: --gpu 12.")
    work = work_of(recipe)
    if recipe.memory.vision_cache != "off":  # as training would
        require_encoder_outputs()
        projects(work.family, work.config.model_type, trained_parts(recipe))
    choice = choose(work, recipe, at_hand) if recipe.memory.fit == "auto" and at_hand else None
    recipe = choice.recipe if choice else recipe
    known = taken(work, recipe)
    found = known[0].estimate
    cards = {card.gib: found.total <= card.usable for card in ([at_hand] if at_hand else map(card_of, CARDS))}
    others = best(work, recipe, known)
    words = "\n".join([work.rows.words(recipe), *_of_several(recipe, found, assumed)])
    return Fit(recipe, found, known[0].pack, words, cards, others, choice)


def with_gpus(recipe: Recipe, gpu: float | None) -> tuple[Recipe, bool]:
    """The recipe with the number of its GPUs, and whether that was assumed: those here, else as many as upstream's."""
    if recipe.launch.gpus is not None or recipe.strategy == "single":
        return recipe, False
    here = torch.cuda.device_count() if gpu is None else 0
    launch = recipe.launch.model_copy(update={"gpus": here or GPUS})
    return recipe.model_copy(update={"launch": launch}), True


def _of_several(recipe: Recipe, found: Estimate, assumed: bool) -> Iterator[str]:
    """What is to be said of an estimate of one of several GPUs."""
    if recipe.strategy == "single":
        return
    why = ", a number that launch.gpus=N changes" if assumed else ""
    yield f"one of {recipe.launch.size} GPUs, by launch.strategy={recipe.strategy}{why}; reckoned, and not measured"
    if found.host:
        gpus = recipe.launch.gpus or 1
        each, all_of_them = found.host / GIB, gpus * found.host / GIB
        yield f"on the host, beside: {each:.1f} GiB for each GPU, {all_of_them:.1f} GiB on a machine of {gpus}"


def work_of(recipe: Recipe) -> Work:
    """The model and the rows of a recipe: its small files where they are at hand, else what comes with the package."""
    own = _at_hand(recipe.model)
    if own is None:
        base = find_base(recipe.model.called)
        rows = Assumed(lambda recipe: base.vision(recipe.media))
        return Work(base.config, base.family, base.image_processor, rows)
    recipe = recipe.model_copy(update={"model": own})
    checkpoint = open_model(own)
    unstated = recipe.data.sources[0].path == UNSTATED
    return Work(
        config=checkpoint.config,
        family=checkpoint.family,
        image_processor=checkpoint.image_processor,
        rows=Assumed(lambda recipe: checkpoint.encoder(recipe).vision) if unstated else _planned(recipe, checkpoint),
    )


def _planned(recipe: Recipe, checkpoint: Checkpoint) -> Planned:
    encoder = checkpoint.encoder(recipe)
    head = stated_head(checkpoint, recipe)
    prepared = prepare(recipe.data, recipe.packing, encoder, task=recipe.task, head=head)
    plan = schedule(prepared.train, recipe.packing, recipe.train, recipe.launch.size)
    return Planned(recipe, checkpoint, encoder, prepared.train, plan, prepared.held_out)


def _at_hand(model: ModelRecipe) -> ModelRecipe | None:
    """A model by the folders of its small files on this machine, where they are there."""
    if model.name:
        folder = _folder(model.name, model.revision)
        return ModelRecipe(name=folder) if folder else None
    folders = [_folder(*named(half)) for half in (model.llm, model.vision) if half]
    return ModelRecipe(llm=folders[0], vision=folders[1]) if all(folders) else None


def _folder(name: str, revision: str | None) -> str | None:
    if name == "tiny" or Path(name).is_dir():
        return name
    try:
        return snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
