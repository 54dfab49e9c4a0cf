"""What memory.fit=auto picks for a run: once, kept beside it, and kept to where the run goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..errors import RecipeError
from ..files import write_whole
from ..memory.card import card_at_hand, card_of
from ..memory.choose import choose
from ..memory.overrides import Work, changed
from ..recipe import Recipe
from .checkpoints import saved

FILE = "fit.json"
"""What a run was asked for, the overrides that were picked, and why; in its folder."""


@dataclass(frozen=True)
class Settled:
    """A recipe with nothing left to pick, the overrides that were picked for it, and what to say of them."""

    recipe: Recipe
    picked: list[str]
    notices: list[str]

    def write(self, asked: Recipe) -> None:
        """Keep it beside the run, with the recipe that it was picked for."""
        kept = {"asked": asked.model_dump(mode="json"), "picked": self.picked, "notices": self.notices}
        write_whole(asked.run_dir / FILE, (json.dumps(kept, indent=2) + "\n").encode())


def settle(work: Work, recipe: Recipe, gpu: float | None = None) -> Settled | None:
    """Pick for the card at hand, or one of `gpu` GiB; None where the recipe leaves nothing to be picked.

    Raises RecipeError where nothing fits.
    """
    if recipe.memory.fit == "off":
        return None
    card = card_of(gpu) if gpu else card_at_hand()
    if card is None:
        notice = "memory.fit: there is no GPU here, so nothing was picked; --gpu 12 picks as for a card of 12 GiB"
        return Settled(changed(recipe, "memory.fit=off"), [], [notice])
    choice = choose(work, recipe, card)
    return Settled(choice.recipe, [each.words for each in choice.picked], list(choice.notices))


def as_started(recipe: Recipe) -> Recipe:
    """The recipe of a stopped run that goes on, with what was picked when it was started; any other as it is.

    Raises RecipeError where that cannot be read.
    """
    file = recipe.run_dir / FILE
    if recipe.memory.fit == "off" or not (file.is_file() and saved(recipe.run_dir)):
        return recipe
    try:
        kept = json.loads(file.read_text())
        asked, picks = dict(kept["asked"]), list(kept["picked"])
    except (ValueError, KeyError, TypeError) as error:
        found = f"{file} is damaged, so what was picked for the run is not known: {error}"
        raise RecipeError(
            f"run_dir: {found}\n  Add --from-scratch, or go on with {recipe.run_dir}/recipe.yaml."
        ) from None
    # Of settings that are other now, nothing is undone: they are compared with the run's own.
    now = recipe.model_dump(mode="json")
    picked = [words for words in picks if asked.get(_section(words)) == now[_section(words)]]
    return changed(recipe, " ".join(["memory.fit=off", *picked]))


def _section(words: str) -> str:
    """The part of a recipe that an override is of."""
    return words.partition("=")[0].partition(".")[0]


def notices_of(settled: Settled | None, asked: Recipe, recipe: Recipe) -> list[str]:
    """What to say of a run whose recipe came to be another than it was asked for."""
    if settled is not None:
        return settled.notices
    return [] if asked == recipe else ["memory.fit: this run goes on as it was picked when it was started"]


def refuse_unused(recipe: Recipe, gpu: float | None) -> None:
    """Raise RecipeError where a card is named and nothing is picked for it."""
    if gpu is not None and recipe.memory.fit == "off":
        raise RecipeError("--gpu: has no effect with memory.fit=off\n  Add memory.fit=auto, or leave --gpu out.")
