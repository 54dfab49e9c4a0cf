"""All that is decided of a run before a weight is loaded: its data, its packs, and where it goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np

from ..data.encode import Encoder
from ..data.packing import needed
from ..data.prepare import Prepared, hash_of, prepare, write_rejects
from ..data.prepared_files import open_prepared, save_prepared
from ..data.schedule import Schedule, schedule
from ..errors import FitError
from ..files import write_whole
from ..memory.overrides import Work
from ..memory.packs import Planned
from ..models.adapters import find_adapter
from ..models.assemble import open_model
from ..models.attention import require_attention
from ..models.cacheable import projects, trained_parts
from ..models.checkpoint import Checkpoint
from ..models.cost import cost_of
from ..models.head_config import stated_head
from ..models.kernels import chosen_kernels
from ..models.sequence import require_sharing
from ..models.vision_cache import require_encoder_outputs
from ..recipe import Recipe
from ..recipe_file import save_recipe
from .broken import REJECTS
from .checkpoints import remove, saved, step_of, sweep
from .jsonlines import keep_whole_lines
from .lock import Lock
from .picked import Settled, as_started, notices_of, settle
from .ranks import ALONE, Ranks
from .resume import LABELS, Resumed, balanced_as_begun, compare_data, find_resumed, write_rows

PREPARED = "prepared"
"""The samples of a run of several processes, in its folder; the first writes them and all map them."""


@dataclass
class Plan:
    """What a run is made by; `settled` is what memory.fit=auto picked for the recipe that was `asked` for."""

    asked: Recipe
    recipe: Recipe
    checkpoint: Checkpoint
    encoder: Encoder
    prepared: Prepared
    schedule: Schedule
    resumed: Resumed
    settled: Settled | None
    lock: Lock
    ranks: Ranks

    @property
    def work(self) -> Work:
        """What memory goes by."""
        return _work(self.recipe, self.checkpoint, self.encoder, self.prepared, self.schedule)

    def tell(self) -> Told:
        """Leave in the run's folder what other processes need of the plan; returns the rest of it. Raises OSError."""
        if self.ranks.size > 1:
            recipe = self.recipe  # whose packing memory.fit may have picked since
            head = stated_head(self.checkpoint, recipe)
            made_by = hash_of(recipe.data, recipe.packing, self.encoder, task=recipe.task, head=head)
            save_prepared(replace(self.prepared, made_by=made_by), recipe.run_dir / PREPARED)
        return Told(self.recipe, self.resumed)

    @property
    def picked(self) -> list[str]:
        """What memory.fit=auto picked, in words."""
        return notices_of(self.settled, self.asked, self.recipe)

    def open_run_dir(self, from_scratch: bool) -> None:
        """Make the run's folder, or clear it of what a killed run was writing; and keep there what is trained on.

        Raises ResumeError where another process holds it.
        """
        run_dir = self.recipe.run_dir
        if from_scratch and run_dir.exists():
            self.lock.take()  # nobody is at it
            aside = (run_dir.with_name(f"{run_dir.name}.{n}") for n in count(1))
            run_dir.rename(next(path for path in aside if not path.exists()))
            self.lock.release()
        run_dir.mkdir(parents=True, exist_ok=True)
        self.lock.take()
        self._clear()
        if self.resumed.checkpoint is None or self.resumed.changed:
            self._keep_what_is_trained_on()

    def _clear(self) -> None:
        """Clear away what a killed run was writing, and set aside the checkpoints that are skipped."""
        run_dir = self.recipe.run_dir
        sweep(run_dir)
        for folder in saved(run_dir) if self.resumed.checkpoint else ():
            if step_of(folder) > self.resumed.step:  # or it would count as one that is kept
                remove(folder.with_name(f"{folder.name}.damaged"))
                folder.rename(folder.with_name(f"{folder.name}.damaged"))
        keep_whole_lines(run_dir / REJECTS)

    def _keep_what_is_trained_on(self) -> None:
        run_dir = self.recipe.run_dir
        save_recipe(self.recipe, run_dir / "recipe.yaml")
        write_rows(run_dir, self.prepared, self.schedule)
        if self.settled is not None:
            self.settled.write(self.asked)
        if (labels := self.prepared.labels) is not None:
            write_whole(run_dir / LABELS, (json.dumps(asdict(labels), indent=2) + "\n").encode())
        write_whole(run_dir / REJECTS, b"")
        write_rejects(self.prepared.rejects, run_dir / REJECTS)


class Told(NamedTuple):
    """What the first process tells the others of its plan; all else they find as it did."""

    recipe: Recipe
    resumed: Resumed


def make_plan(
    asked: Recipe,
    lock: Lock,
    ranks: Ranks = ALONE,
    from_scratch: bool = False,
    import_upstream: bool = False,
    gpu: float | None = None,
    only: Schedule | None = None,
    accept_changes: bool = False,
) -> Plan:
    """Read and plan the data; the arguments are those of `start`.

    Raises RecipeError, ResumeError, DataError, SampleError and FitError.
    """
    asked = recipe = balanced_as_begun(asked, ranks, from_scratch)
    resumed = Resumed(None, [], [])
    if not from_scratch and asked.run_dir.is_dir():
        lock.take()
        recipe = as_started(asked)
        resumed = find_resumed(recipe, accept_changes)
    checkpoint = _open_model(recipe, import_upstream)
    encoder = checkpoint.encoder(recipe)
    if recipe.memory.vision_cache != "off":
        projects(checkpoint.family, checkpoint.config.model_type, trained_parts(recipe))
    head = stated_head(checkpoint, recipe)
    prepared = prepare(recipe.data, recipe.packing, encoder, task=recipe.task, head=head)
    packs = only or _schedule(recipe, checkpoint, encoder, prepared, ranks)
    settled = settle(_work(recipe, checkpoint, encoder, prepared, packs), recipe, gpu)
    if settled is not None:
        recipe = settled.recipe
        packs = only or _schedule(recipe, checkpoint, encoder, prepared, ranks)
    resumed = compare_data(resumed, recipe, prepared, packs, accept_changes)
    return Plan(asked, recipe, checkpoint, encoder, prepared, packs, resumed, settled, lock, ranks)


def follow_plan(told: Told, lock: Lock, ranks: Ranks, import_upstream: bool, only: Schedule | None = None) -> Plan:
    """The plan that the first process has made, in another."""
    recipe, resumed = told
    checkpoint = _open_model(recipe, import_upstream)
    encoder = checkpoint.encoder(recipe)
    head = stated_head(checkpoint, recipe)
    folder = recipe.run_dir / PREPARED
    prepared = open_prepared(folder, recipe.data, recipe.packing, encoder, task=recipe.task, head=head)
    packs = only or _schedule(recipe, checkpoint, encoder, prepared, ranks)
    return Plan(recipe, recipe, checkpoint, encoder, prepared, packs, resumed, None, lock, ranks)


def _open_model(recipe: Recipe, import_upstream: bool) -> Checkpoint:
    """Open the small files of a checkpoint, once it is clear that what is asked of it can be had."""
    chosen_kernels(recipe)
    require_attention(recipe.memory.attention)
    if recipe.memory.vision_cache != "off":
        require_encoder_outputs()
    if recipe.model.adapter:
        find_adapter(recipe.model.adapter, import_upstream, recipe.model)
    checkpoint = open_model(recipe.model)
    require_sharing(checkpoint.config, recipe.launch.sequence)
    return checkpoint


def _schedule(recipe: Recipe, checkpoint: Checkpoint, encoder: Encoder, prepared: Prepared, ranks: Ranks) -> Schedule:
    """The packs of a run; where several GPUs train what sees, each pack has a picture. Raises FitError."""
    parts = {recipe.part("projector"), recipe.part("vision_tower")}
    touch = cost = None
    if recipe.packing.balance != 1:
        cost = cost_of(checkpoint.config, checkpoint.family, recipe)
    several = recipe.packing.balance != 1 or ranks.size > 1
    if several and (parts != {"frozen"} or recipe.model.adapter):
        touch = encoder.blank_length().tokens
        _make_room(prepared, recipe, touch)
    return schedule(prepared.train, recipe.packing, recipe.train, touch=touch, cost=cost)


def _make_room(prepared: Prepared, recipe: Recipe, touch: int) -> None:
    """Leave out, or refuse, what has no picture and no room for a blank one. Raises FitError."""
    most, samples = recipe.packing.max_length, prepared.train
    fits = needed(samples.lengths, touch) <= most
    if fits.all():
        return
    if recipe.data.oversize == "error":
        first = samples[int(fits.argmin())]
        tokens = samples.lengths[fits.argmin(), 0]
        found = f"needs {tokens:,} tokens and {touch} of a blank picture; packing.max_length is {most:,}"
        remedy = "Raise packing.max_length, or set data.oversize=drop. Several GPUs that train what sees need one each."
        raise FitError(first.where, found, remedy, first.id)
    prepared.oversize += int((~fits).sum())
    prepared.train = samples.take(np.flatnonzero(fits))


def _work(recipe: Recipe, checkpoint: Checkpoint, encoder: Encoder, prepared: Prepared, packs: Schedule) -> Work:
    rows = Planned(recipe, checkpoint, encoder, prepared.train, packs, prepared.held_out)
    return Work(checkpoint.config, checkpoint.family, checkpoint.image_processor, rows)
