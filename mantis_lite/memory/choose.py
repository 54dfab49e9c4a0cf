"""memory.fit=auto: the mildest settings under which a recipe's largest step fits a card."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import RecipeError
from ..recipe import Recipe
from .card import Card
from .estimate import GIB
from .overrides import Taken, Work, changed, exact, in_4_bits, offloaded, shorter, taken, taken_less

SPARE = 0.05
"""The share of a card that is left free where settings are picked for speed: an estimate may be a little low."""


@dataclass(frozen=True)
class Picked:
    """An override that was picked, and what a step took of the card before and after it, in bytes."""

    words: str
    before: int
    after: int


@dataclass(frozen=True)
class Choice:
    """A recipe that fits a card, what was picked for it, one thing after the other, and what a step takes, in bytes."""

    recipe: Recipe
    card: Card
    picked: list[Picked]
    total: int

    @property
    def notices(self) -> Iterator[str]:
        """What was picked and why, a line each."""
        first = self.picked[0].before if self.picked else self.total
        yield f"memory.fit: as the recipe is, a step takes {first / GIB:.2f} GiB, and this is {self.card.words}"
        for each in self.picked:
            why = ", for speed" if each.after > each.before else ""
            yield f"memory.fit picks {each.words}{why}: {each.before / GIB:.2f} -> {each.after / GIB:.2f} GiB"
        if not self.picked:
            yield "memory.fit picks nothing: it fits"


def choose(work: Work, recipe: Recipe, card: Card) -> Choice:
    """Pick, the mildest first, until the largest step fits; then give back what that made needless.

    What the recipe says of these keys is changed where it must be, and towards less memory alone. Where it leaves
    checkpointing open and all of it fits, no more layers are computed again than the card asks for. Raises RecipeError
    where nothing is enough.
    """
    known = taken(work, recipe)
    fits = changed(recipe, "memory.fit=off")
    if known[0].estimate.total <= card.usable:
        faster = _with_room(work, fits, int(card.usable * (1 - SPARE)))
        picked = [Picked(words, known[0].estimate.total, total) for words, total in faster]
        for each in picked:
            fits = changed(fits, each.words)
        return Choice(fits, card, picked, picked[-1].after if picked else known[0].estimate.total)
    words = _needed(work, fits, known, _enough(work, fits, known, card), card)
    picked, before = [], known[0].estimate.total
    for word in words:
        fits = changed(fits, word)
        after = taken_less(work, fits, recipe, known).estimate.total
        picked.append(Picked(word, before, after))
        before = after
    return Choice(fits, card, picked, before)


def _with_room(work: Work, recipe: Recipe, room: int) -> Iterator[tuple[str, int]]:
    """The override with which as few layers are computed again as there is room for, and what a step takes then."""
    if recipe.memory.checkpointing != "auto":
        return

    def with_layers(count: int) -> tuple[str, int]:
        words = f"memory.checkpointing={count or 'off'}"
        return words, taken(work, changed(recipe, words))[0].estimate.total

    depth = work.config.get_text_config().num_hidden_layers
    count = bisect_left(range(depth), True, key=lambda count: with_layers(count)[1] <= room)
    if count < depth:
        yield with_layers(count)


def _enough(work: Work, recipe: Recipe, known: list[Taken], card: Card) -> list[str]:
    """Overrides with which the largest step fits, each picked because it did not with those before it."""
    picked: list[str] = []
    now, total = recipe, known[0].estimate.total
    while (words := next(_steps(work, now), None)) is not None:
        now = changed(now, words)
        key = words.partition("=")[0]
        picked = [*(other for other in picked if not other.startswith(key)), words]  # shorter once more
        total = taken_less(work, now, recipe, known).estimate.total
        if total <= card.usable:
            return picked
    short = f"the largest step takes {known[0].estimate.total / GIB:.2f} GiB, and still {total / GIB:.2f} with"
    raise RecipeError(
        f"memory.fit: nothing fits {card.words}: {short} {' '.join(picked) or 'nothing left to pick'}\n"
        f"  {work.rows.why_no_shorter}. "
        "`mantis-lite fit` with memory.fit=off shows what else would save."
    )


def _steps(work: Work, recipe: Recipe) -> Iterator[str]:
    """What may be picked next, the mildest first: the same numbers, 4 bits, the host's memory, shorter packs."""
    yield from exact(recipe)
    yield from in_4_bits(work, recipe)
    yield from offloaded(recipe)
    yield from shorter(work, recipe)


def _needed(work: Work, recipe: Recipe, known: list[Taken], picked: list[str], card: Card) -> list[str]:
    """What was picked without what the rest does without, the harshest given back first; the last one is needed."""
    for words in picked[-2::-1]:
        less = [other for other in picked if other is not words]
        now = recipe
        try:
            for other in less:
                now = changed(now, other)
        except RecipeError:
            continue  # what was picked after it stands on it, as parts in 4 bits do on QLoRA
        if taken_less(work, now, recipe, known).estimate.total <= card.usable:
            picked = less
    return picked
