"""Whether a stopped run may go on: from which checkpoint, and with what recipe and data it was started."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..changes import changes
from ..data.labels import Labels, some
from ..data.prepare import Prepared, Samples
from ..data.schedule import Schedule
from ..errors import RecipeError, ResumeError, one_line
from ..files import write_whole
from ..models.precision import working_dtype
from ..recipe import Recipe
from ..recipe_file import load_recipe
from .checkpoints import newest, saved, step_of
from .ranks import Ranks

LABELS = "labels.json"
"""What the scores of a run of task=classify mean, in order."""

ROWS = "rows.npz"
"""What a run trains on: for each row where it stands and what is in it, and the packs they make."""

FIXED = (
    *("model", "task", "method", "lora", "head", "memory.quantize", "memory.optimizer"),
    *("trainable.language_model", "trainable.projector", "trainable.vision_tower"),
)
"""What a checkpoint's tensors are made by: a run cannot go on with another."""

FREE = (
    *("train.save_steps", "train.save_total_limit", "train.dataloader_", "train.report_to", "train.run_name"),
    *("launch.gpus", "launch.nodes", "launch.sequence"),
)
"""What makes no difference to what is trained."""

STRATEGY = "launch.strategy"

REMEDY = "Add --from-scratch to move it aside, or set another run_dir."


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on, if it does; `skipped` says which checkpoints could not be used, and why."""

    checkpoint: Path | None
    skipped: list[str]
    changed: list[str]
    """What the recipe and data came to be, where --accept-changes lets them."""
    unsaved: bool = False
    """Whether a run was begun there that has saved nothing."""

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint else 0

    def notices(self) -> list[str]:
        """What a user should know of how the run goes on."""
        said = [*self.skipped, *(f"accepted: another {change}" for change in self.changed)]
        if self.checkpoint:
            said.append(f"goes on from {self.checkpoint.name}")
        elif self.unsaved:
            said.append("an earlier start in this folder had saved no checkpoint: begins at step 0")
        return said


def find_resumed(recipe: Recipe, accept_changes: bool) -> Resumed:
    """Where a run in the recipe's folder goes on. Raises ResumeError for one that is finished, damaged or another."""
    run_dir = recipe.run_dir
    if any((run_dir / done).exists() for done in ("adapter", "model")):
        raise ResumeError(f"run_dir: {run_dir} holds a finished run\n  {REMEDY}")
    checkpoint, skipped = newest(run_dir)
    before = _recipe_of(run_dir) if checkpoint else recipe
    changed = list(_changes(before, recipe))
    # What is in parts goes on in other parts, and what is whole as a whole.
    same = before.sharded == recipe.sharded
    free, fixed = ((*FREE, STRATEGY), FIXED) if same else (FREE, (*FIXED, STRATEGY))
    for change in changed:
        if change.startswith(fixed):
            raise ResumeError(f"run_dir: {run_dir} holds a run with another {change}\n  {REMEDY}")
    if (refused := [change for change in changed if not change.startswith(free)]) and not accept_changes:
        raise _refusal(run_dir, refused)
    return Resumed(checkpoint, skipped, changed, checkpoint is None and (run_dir / ROWS).is_file())


def balanced_as_begun(recipe: Recipe, ranks: Ranks, from_scratch: bool) -> Recipe:
    """The recipe with packing.balance settled: as the run was begun that goes on, else by the processes there are.

    So its steps stay the same on another number of processes. Raises ResumeError.
    """
    if recipe.packing.balance != "auto":
        return recipe
    balance: Any = ranks.size
    if saved(recipe.run_dir) and not from_scratch:
        before = _recipe_of(recipe.run_dir).packing.balance
        balance = 1 if before == "auto" else before
    return recipe.model_copy(update={"packing": recipe.packing.model_copy(update={"balance": balance})})


def compare_data(
    resumed: Resumed, recipe: Recipe, prepared: Prepared, packs: Schedule, accept_changes: bool
) -> Resumed:
    """As before, with what became of the data. Raises ResumeError where it has changed and may not."""
    if resumed.checkpoint is None:
        return resumed
    if prepared.labels is not None:
        _refuse_other_labels(recipe.run_dir, prepared.labels)
    if resumed.step > packs.steps:
        found = f"{recipe.run_dir} has taken {resumed.step} steps, and this run has only {packs.steps}"
        raise ResumeError(f"run_dir: {found}\n  Raise train.num_train_epochs or train.max_steps. {REMEDY}")
    changed = _changed_rows(recipe.run_dir / ROWS, prepared, packs)
    if not changed or accept_changes:
        return replace(resumed, changed=[*resumed.changed, *changed])
    raise _refusal(recipe.run_dir, changed)


def write_rows(run_dir: Path, prepared: Prepared, packs: Schedule) -> None:
    """Keep what a run trains on, to be compared when it goes on."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **_rows(prepared, packs))
    write_whole(run_dir / ROWS, content.getvalue())


def _recipe_of(run_dir: Path) -> Recipe:
    """The recipe that a run was started with. Raises ResumeError."""
    file = run_dir / "recipe.yaml"
    try:
        return load_recipe(file)
    except RecipeError as error:
        raise ResumeError(f"run_dir: {file} cannot be read: {one_line(error)}\n  {REMEDY}") from None


def _refusal(run_dir: Path, changed: list[str]) -> ResumeError:
    found = "\n  ".join(f"another {change}" for change in changed)
    return ResumeError(
        f"run_dir: {run_dir} holds a run with\n  {found}\n"
        "  Add --accept-changes to go on with them, or --from-scratch to move the run aside, or set another run_dir."
    )


def _changes(before: Recipe, now: Recipe) -> Iterator[str]:
    """The keys that differ, each with both values; a folder that was moved is the same run."""
    place = {"run_dir"}
    for change in changes(before.model_dump(mode="json", exclude=place), now.model_dump(mode="json", exclude=place)):
        yield f"{change.key}: {_short(change.before)} before, {_short(change.now)} now"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rows(prepared: Prepared, packs: Schedule) -> dict[str, np.ndarray]:
    train, held_out = prepared.train, prepared.held_out
    parts = {"": train} if held_out is None else {"": train, "held_out_": held_out}
    found: dict[str, np.ndarray] = {}
    for prefix, samples in parts.items():
        found |= {f"{prefix}{key}": getattr(samples, key) for key in ("source", "row", "digest")}
    packed = np.array(f"{packs.packs.digest()}, {packs.per_step} a step")
    return found | {"packs": packed, "dtype": np.array(str(working_dtype()))}


def _changed_rows(file: Path, prepared: Prepared, packs: Schedule) -> list[str]:
    try:
        with np.load(file) as stored:
            before = dict(stored)
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, BadZipFile, zlib.error):
        return [f"data: {file} is damaged or missing, so that it cannot be compared"]
    now = _rows(prepared, packs)
    changes = [
        *_changed_samples("data", "", before, now, prepared.train),
        *_changed_samples("held-out data", "held_out_", before, now, prepared.held_out),
    ]
    if not changes and before["packs"] != now["packs"]:
        changes = ["packs: the same rows are packed in another way, as by another version of a library"]
    if before["dtype"] != now["dtype"]:
        changes.append(f"precision: {before['dtype']} before, {now['dtype']} now, as this machine has it")
    return changes


def _changed_samples(what: str, prefix: str, before: dict, now: dict, samples: Samples | None) -> Iterator[str]:
    counts = [len(of[f"{prefix}digest"]) if f"{prefix}digest" in of else 0 for of in (before, now)]
    if counts[0] != counts[1]:
        yield f"{what}: {counts[0]:,} rows before, {counts[1]:,} now"
    elif samples is not None:
        other = np.zeros(counts[1], dtype=bool)
        for key in ("source", "row", "digest"):
            other |= before[prefix + key] != now[prefix + key]
        if other.any():
            first = int(other.argmax())
            where = samples.rows[samples.source[first]].where(int(samples.row[first]))
            yield f"{what}: {int(other.sum()):,} of {counts[1]:,} rows, the first being {where}"


def _refuse_other_labels(run_dir: Path, labels: Labels) -> None:
    """A stopped run's scores mean what they meant: changed data must not give them other names."""
    try:
        before = json.loads((run_dir / LABELS).read_text())
    except (OSError, ValueError):
        raise ResumeError(f"run_dir: {run_dir / LABELS} is damaged or missing\n  {REMEDY}") from None
    now = json.loads(json.dumps(asdict(labels)))
    if before != now:
        found = f"{run_dir} holds a run that scores {some(before['names'])}, and the data has {some(labels.names)}"
        raise ResumeError(f"head.labels: {found}\n  State head.labels, or add --from-scratch to move the run aside.")
