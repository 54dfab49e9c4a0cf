"""A recipe's largest pack trained on for two steps, and the memory that took beside what was estimated."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..data.packs import Packs
from ..data.schedule import Schedule
from ..errors import RecipeError
from ..memory.estimate import estimate
from ..memory.overrides import taken
from ..memory.packs import Planned
from ..memory.step import Pack, machine_of
from ..recipe import Recipe
from ..recipe_file import make_recipe
from ..training.run import Run
from ..training.start import start
from .fit import work_of


@dataclass(frozen=True)
class Probe:
    """What was run on which `machine`, and bytes (what, estimated, measured) of its peak."""

    pack: Pack
    machine: str
    figures: list[tuple[str, int, int]]


PLAIN = (
    "data.eval=null",
    "eval.every=null",
    "train.save_strategy=no",
    "train.load_best_model_at_end=false",
    "train.eval_on_start=false",
    "train.report_to=none",
)
"""Two steps and nothing beside them."""


def probe(recipe: Recipe) -> Probe:
    """Load the model as training does and take two steps of the largest pack, the second with the optimiser's state.

    On a CPU what torch's allocator gave out is measured, in float32, and the estimate is of that. Raises RecipeError,
    errors of the data, and OutOfMemory.
    """
    work = work_of(recipe)
    if not isinstance(work.rows, Planned):
        raise RecipeError("fit --probe: runs a pack of the data, and none was given\n  Add data=my.json.")
    gpu = torch.cuda.is_available()
    each = min(2, work.rows.plan.per_step)
    pack = replace(taken(work, recipe)[0].pack, waiting=float(each - 1))
    only = Schedule(Packs.of([pack.members] * 2 * each), [2 * each], each)
    with tempfile.TemporaryDirectory() as folder:
        settings = recipe.model_dump(mode="json") | {"run_dir": f"{folder}/run"}
        run = start(make_recipe(settings, PLAIN), only=only)
        measured = _on_gpu(run) if gpu else [peak_on_cpu(run.trainer.model, run.walk)]
    found = estimate(work.config, recipe, pack, machine_of(recipe, each > 1, gpu), work.family)
    estimated = [found.allocated, found.allocated + found.overhead.get("gaps between tensors", 0)]
    whats = ("tensors", "tensors and the gaps between them")
    machine = torch.cuda.get_device_name() if gpu else "this CPU, in float32, which is not what a GPU would take"
    return Probe(pack, machine, list(zip(whats, estimated, measured, strict=False)))


def _on_gpu(run: Run) -> list[int]:
    """What a card's tensors took at most, and what the allocator held for them."""
    torch.cuda.reset_peak_memory_stats()
    run.walk()
    return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]


def peak_on_cpu(model: nn.Module, run: Callable[[], Any]) -> int:
    """The most bytes alive while this ran: the model's own, and what torch's allocator had given out beyond them."""
    held = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in _held(model)}
    gc.collect()  # what a run before left behind would be given back in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return sum(held.values()) + top


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Weights, and what bitsandbytes keeps beside them."""
    for tensor in [*model.parameters(), *model.buffers()]:
        yield tensor
        if state := getattr(tensor, "quant_state", None):
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
