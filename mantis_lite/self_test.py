"""Whether Tiny Mantis trains, goes on, merges and packs on this machine."""

from __future__ import annotations

import json
import math
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .agreement import at_answers, logits_of
from .data.collate import collate
from .errors import CheckError, MantisError, one_line
from .merge import merge
from .models.precision import working_dtype
from .quickstart import read_samples
from .recipe import Recipe
from .recipe_file import make_recipe
from .tiny import tasks
from .tiny.pictures import draw
from .trained import open_trained
from .training.jsonlines import lines_of
from .training.run_files import METRICS
from .training.start import start

ROWS, STEPS, STOP = 8, 4, 2
"""Rows, which are all in each step; steps; and the one that a run is stopped after."""
LOSS_APART = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}
"""How far, as a share, the losses of a run that was stopped may be from those of one that was not."""
LOGITS_APART = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.5}
"""How far logits in a pack may be from those of each sample alone."""


@dataclass(frozen=True)
class Check:
    """Something that has to hold here: whether it does, and what was found."""

    name: str
    passed: bool
    found: str


def checked(name: str, does: Callable[[], str]) -> Check:
    """What a check finds; whatever it raises is what it found wrong."""
    try:
        return Check(name, True, does())
    except Exception as error:  # whatever is wrong with a machine is what is looked for here, and is told
        if isinstance(error, MantisError):
            return Check(name, False, ". ".join(line.strip() for line in str(error).splitlines()))
        at = traceback.extract_tb(error.__traceback__)[-1]
        return Check(name, False, f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {one_line(error)}")


def self_test(folder: Path) -> Iterator[Check]:
    """Each of the four; what stands on a run that failed is not tried, and says so."""
    data, whole, stopped = folder / "train.jsonl", folder / "whole", folder / "stopped"
    steps: list[tuple[str, Callable[[], str]]] = [
        ("train", lambda: _train(tiny_recipe(data, whole))),
        ("resume", lambda: _resume(tiny_recipe(data, stopped), whole)),
        ("merge", lambda: _merge(whole, folder / "merged")),
        ("packed == separate", lambda: _packed(whole, data)),
    ]
    drawn = checked("draw", lambda: _draw(data))
    if not drawn.passed:
        yield drawn
        return
    trained = checked(*steps[0])
    yield trained
    for name, does in steps[1:]:
        yield checked(name, does) if trained.passed else Check(name, False, "not tried, as training failed")


def _draw(file: Path) -> str:
    """Write ROWS questions of a kind that Tiny Mantis was never asked, and their pictures beside."""
    rows = []
    for number in range(ROWS):
        rng = random.Random(number)
        exercise = tasks.odd_one_out(rng)
        names = [f"{number}-{at}.png" for at in range(len(exercise.things))]
        for name, thing in zip(names, exercise.things, strict=True):
            draw(thing, rng).save(file.parent / name)
        rows.append(json.dumps(tasks.row(f"drawn-{number}", exercise, names)))
    file.write_text("\n".join(rows) + "\n")
    return f"{ROWS} rows"


def tiny_recipe(data: Path, run_dir: Path) -> Recipe:
    """LoRA on Tiny Mantis; each of its STEPS sees all rows, so that the loss falls from step to step."""
    train = {"num_train_epochs": STEPS, "samples_per_step": ROWS, "learning_rate": 2e-3, "logging_steps": 1}
    return make_recipe(
        {
            "model": "tiny",
            "data": str(data),
            "run_dir": str(run_dir),
            "method": "lora",
            "prompt": {"system": ""},
            "packing": {"max_length": 1024},
            "train": train | {"lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True},
        }
    )


def _losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines_of(run_dir / METRICS) if "loss" in line]


def _train(recipe: Recipe) -> str:
    start(recipe).train()
    found = _losses(recipe.run_dir)
    if len(found) != STEPS or not all(map(math.isfinite, found)) or not found[-1] < found[0]:
        raise CheckError(f"the loss does not fall in {STEPS} steps on {ROWS} rows: {_in_short(found)}")
    return f"loss {found[0]:.3f} to {found[-1]:.3f} in {STEPS} steps"


class _Stop(TrainerCallback):
    """Has a run save and stop after its step STOP."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == STOP


def _resume(recipe: Recipe, whole: Path) -> str:
    """A run that is stopped and goes on has to come to the losses of the one that was not."""
    stopped = start(recipe, [_Stop()])
    try:
        stopped.walk()
    finally:
        stopped.lock.release()
    going_on = start(recipe)
    if going_on.resumed.step != STOP:
        raise CheckError(f"a run that is stopped after step {STOP} goes on from step {going_on.resumed.step}")
    going_on.train()
    found, expected = _losses(recipe.run_dir), _losses(whole)
    limit = LOSS_APART[working_dtype()]
    if len(found) != len(expected) or not all(map(partial(math.isclose, rel_tol=limit), found, expected)):
        raise CheckError(f"stopped after step {STOP} the losses are {_in_short(found)}, else {_in_short(expected)}")
    return f"stopped after step {STOP} of {STEPS} and gone on with, the losses are the same"


def _merge(run_dir: Path, to: Path) -> str:
    """Merging raises CheckError itself where the merged model says something else."""
    agreed = merge(run_dir, to).agreement
    assert agreed is not None
    return f"the merged model chooses as the adapter does at {agreed.share:.1%} of {agreed.positions} tokens"


def _packed(run_dir: Path, data: Path) -> str:
    """The answers' logits in one pack of all rows, and of each row alone."""
    trained = open_trained(run_dir)
    model, samples = trained.load(), read_samples(data)
    separate = logits_of(model, trained.encoder, samples)
    pack = collate([trained.encoder.encode(sample) for sample in samples], trained.encoder.vision.batch)
    with torch.no_grad():
        together, _ = at_answers(model, pack)
    apart = (separate - together.cpu()).abs().max().item()
    limit = LOGITS_APART[model.dtype]
    if not apart <= limit:
        raise CheckError(
            f"logits of a row in a pack are apart by {apart:.2g} from those of it alone, at most {limit:g}"
        )
    return f"logits of {len(samples)} rows are apart by {apart:.1e} at most"


def _in_short(losses: list[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses) or "none"
