"""What to say where a card had no room: the pack, what took most, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.trainer_utils import get_last_checkpoint

from ..errors import MantisError, OutOfMemory, one_line
from ..recipe import Recipe
from .estimate import GIB
from .overrides import Override, Work, best, taken


def shortage(when: str, work: Work, recipe: Recipe, error: Exception) -> OutOfMemory:
    """The error of a run that ran out of memory `when`; nothing is asked of the card for it."""
    found = f"out of memory {when}: {one_line(error)}"
    try:
        known = taken(work, recipe)
        helping = best(work, recipe, known)
    except MantisError as other:  # a picture that is gone meanwhile, say: it must not hide that memory ran out
        return OutOfMemory(f"{found}\n  What would help cannot be said, as the packs cannot be read: {other}")
    pack, estimate = known[0].pack, known[0].estimate
    term, size = max({**estimate.terms, **estimate.overhead}.items(), key=lambda item: item[1])
    begun = get_last_checkpoint(str(recipe.run_dir)) if recipe.run_dir.is_dir() else None
    whole = ", were the row not shared" if recipe.launch.sequence > 1 else ""
    add = "Add to the command, with --from-scratch as the run has begun:" if begun else "Add to the command:"
    lines = [
        found,
        f"The largest pack, of {pack.tokens:,} tokens and {pack.patches:,} patches ({work.rows.where(pack)}), is "
        f"estimated at {estimate.total / GIB:.2f} GiB{of(recipe)}{whole}; "
        f"most of it, {size / GIB:.2f} GiB, is: {term}.",
        add if helping else "No override would save more: take a larger card.",
        *(f"  {saving(other, estimate.total)}" for other in helping),
    ]
    return OutOfMemory("\n  ".join(lines))


@contextmanager
def telling(when: str, work: Work, recipe: Recipe) -> Iterator[None]:
    """Turn torch's error of a card without room into one that says what would help. Raises OutOfMemory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise shortage(when, work, recipe, error) from None


def of(recipe: Recipe) -> str:
    """Which of several GPUs an estimate is of, in words."""
    if recipe.strategy == "single":
        return ""
    return f" of each of {recipe.launch.size} GPUs, by launch.strategy={recipe.strategy}"


def saving(other: Override, before: int) -> str:
    """An override with what it saves, in a line."""
    return f"{other.words:<56} saves {(before - other.total) / GIB:5.2f} GiB, leaves {other.total / GIB:.2f}"
