"""The first run: Tiny Mantis learns, on a CPU and in minutes, a multi-image task it could not do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback

from .data.encode import Encoder
from .data.sample import Sample
from .data.source import open_source
from .generate import answer
from .recipe import SourceRecipe
from .recipe_file import load_recipe
from .tiny import tasks
from .training.start import start

ROWS, HELD_OUT, SEED = 3000, 200, 0


@dataclass(frozen=True)
class Outcome:
    """Held-out accuracy before and after, shares of exact answers; where the adapter is, and what to type next."""

    before: float
    after: float
    adapter: Path
    following: Sequence[tuple[str, str]]


def quickstart(
    overrides: Sequence[str],
    callbacks: Sequence[TrainerCallback],
    from_scratch: bool,
    say: Callable[[str], None],
) -> Outcome:
    """Draw the pictures, measure, fine-tune by the recipe `quickstart`, measure again; `say` is told each stage."""
    torch.set_num_threads(1)  # matrices this small lose more by being shared between cores than they gain
    recipe = load_recipe("quickstart", ["data=not-drawn-yet", *overrides])
    folder = recipe.run_dir.with_name(f"{recipe.run_dir.name}-data")
    say(f"drawing {ROWS + HELD_OUT} rows of four pictures into {folder}")
    tasks.write(folder, rows=ROWS, held_out=HELD_OUT, seed=SEED)
    rows = [f"data={folder / 'train.jsonl'}", f"data.eval={folder / 'held_out.jsonl'}"]
    recipe = load_recipe("quickstart", [*rows, *overrides])
    run = start(recipe, callbacks, from_scratch)
    held_out = read_samples(folder / "held_out.jsonl")
    say(f"asking the model {len(held_out)} held-out questions before training")
    before = accuracy(run.trainer.model, run.encoder, held_out)
    adapter = run.train()
    say("and after")
    after = accuracy(run.trainer.model, run.encoder, held_out)
    return Outcome(before, after, adapter, run.facts["next"]["finished"])


def read_samples(path: Path) -> list[Sample]:
    """All samples of a data file. Raises SampleError, DataError."""
    rows = open_source(SourceRecipe(path=str(path)))
    return [rows.sample(i) for i in range(len(rows))]


def accuracy(model: PreTrainedModel, encoder: Encoder, samples: Sequence[Sample]) -> float:
    """The share of samples whose last answer the model gives to the letter."""
    right = 0
    for sample in samples:
        expected = "".join(part for part in sample.turns[-1].content if isinstance(part, str))
        question = replace(sample, turns=sample.turns[:-1])
        right += answer(model, encoder, question, max_new_tokens=16) == expected.strip()
    return right / len(samples)
