"""A run of the package's own training under a clock: tokens a second, peaks, and whether it learns."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from mantis_lite.data.encode import IGNORE
from mantis_lite.errors import OutOfMemory
from mantis_lite.memory.card import card_of
from mantis_lite.memory.estimate import CONTEXT, GIB
from mantis_lite.memory.packs import largest_packs
from mantis_lite.memory.step import machine_of
from mantis_lite.recipe_file import load_recipe
from mantis_lite.training.picked import FILE
from mantis_lite.training.run import Run
from mantis_lite.training.start import start

from . import card
from .gpu_models import Place, random_weights
from .gpu_step import RECIPES

WARM = 2
"""Steps that are left out of the times: kernels are compiled and memory is found in them."""

STEP = ["train.samples_per_step=null", "train.gradient_accumulation_steps=1", "train.save_strategy=no"]
RATE = ["train.learning_rate=1e-3", "train.lr_scheduler_type=constant", "train.warmup_steps=0"]
"""A rate at which random weights learn to say ten words in a few steps."""


class StepClock(TrainerCallback):
    """When each step ended, and what it took of the card at most; with a profiler over the step `profiled`."""

    def __init__(self, profiled: int | None = None) -> None:
        self.ends: list[float] = []
        self.peaks: list[tuple[float, float]] = []
        self.profiled = profiled
        self.profiler: profile | None = None
        self.begun = self.profiled_seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        card.forget_peaks()
        if state.global_step == self.profiled:
            card.wait()
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.there() else [])]
            self.profiler = profile(activities=kinds)
            self.profiler.start()
            self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        card.wait()
        self.ends.append(time.perf_counter())
        self.peaks.append(card.peaks())
        if self.profiler is not None and state.global_step - 1 == self.profiled:
            self.profiled_seconds = self.ends[-1] - self.begun
            self.profiler.stop()


def prepared(
    place: Place,
    family: str,
    words: Sequence[str],
    model: Path,
    data: Path,
    steps: int,
    clock: StepClock,
    gib: float | None = None,
) -> Run:
    """A run of random weights before its first step: the recipe of the family, with overrides in `words`.

    With memory.fit=auto it is picked for a card of `gib` GiB.
    """
    card.limit(None)
    card.clean()
    folder = place.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"model={model}", f"data={data}", f"run_dir={folder}", f"train.max_steps={steps}", *STEP]
    with random_weights():
        run = start(load_recipe(RECIPES[family], [*settings, *words]), [clock], gpu=gib)
    card.clean()
    return run


def room(gib: float) -> float:
    """GiB that a process can have for its tensors in a card of so many."""
    return (card_of(gib).usable - CONTEXT) / GIB


def measured(
    place: Place, family: str, words: Sequence[str], model: Path, data: Path, steps: int, gib: float | None = None
) -> dict[str, Any]:
    """Train so many timed steps of a pack each behind those that warm up.

    With `gib` memory.fit=auto picks for a card of so many, and the process has no more.
    """
    words = [*words, "memory.fit=auto"] if gib else words
    begun = time.perf_counter()
    clock = StepClock(WARM + 1 if place.profile else None)
    run = prepared(place, family, words, model, data, WARM + steps, clock, gib)
    built, weights = time.perf_counter() - begun, card.held()
    card.limit(room(gib) if gib else None)
    run.walk()
    card.limit(None)
    if clock.profiler is not None:
        shown(clock)
    times = np.diff(clock.ends)[WARM - 1 :]
    packs = run.schedule.packs[WARM:]
    counts = packs.sums(run.prepared.train.lengths)
    figures = {
        "tokens_per_second": round(float(counts[:, 0].sum() / times.sum())),
        "tokens_per_second_min": round(float((counts[:, 0] / times).min())),
        "tokens_per_second_max": round(float((counts[:, 0] / times).max())),
        "supervised_per_second": round(sum(_supervised(run, pack) for pack in packs) / times.sum()),
        "samples_per_second": round(len(packs.samples) / times.sum(), 3),
        **card.spread("step_seconds", times),
        "steps": len(times),
        "tokens_per_step": round(float(counts[:, 0].mean())),
        "patches_per_step": round(float(counts[:, 1].mean())),
        "weights_gib": round(weights, 2),
        **most(clock),
        "build_seconds": round(built, 1),
    }
    if gib:
        figures["picked"] = json.loads((run.recipe.run_dir / FILE).read_text())["picked"]
        words = [*words, *figures["picked"]]
    return figures | learning(run) | setting(run, family, words)


def peaks_by_length(
    place: Place, family: str, words: Sequence[str], model: Path, data: Path, limit: float | None = None
) -> dict[str, Any]:
    """The peak of a step of each row alone, from the shortest; the first comes twice, as the optimizer has no state.

    With a `limit` in GiB the process has no more for its tensors. Where a row does not fit, the next are not tried.
    """
    clock = StepClock()
    rows = len(data.read_text().splitlines())
    run = prepared(place, family, ["packing=off", *words], model, data, rows, clock)
    tokens = run.schedule.packs.sums(run.prepared.train.lengths[:, 0])
    order = tokens.argsort(kind="stable")
    run.schedule = replace(run.schedule, packs=run.schedule.packs.take(order))
    run.trainer.train_dataset = run.trainer.train_dataset.select(order)
    weights = card.held()
    card.limit(limit)
    figures: dict[str, Any] = {"weights_gib": round(weights, 2)}
    try:
        run.walk()
    except OutOfMemory as error:
        figures["out_of_memory"] = str(error).splitlines()[0]
    card.limit(None)
    times = np.diff([*clock.ends[:1], *clock.ends])
    found = zip(tokens[order].tolist(), clock.peaks, times, strict=False)
    figures["by_length"] = {
        str(length): {"peak_gib": round(peak, 3), "reserved_gib": round(reserved, 3), "seconds": round(float(took), 2)}
        for length, (peak, reserved), took in list(found)[1:]
    }
    return figures | setting(run, family, words)


def most(clock: StepClock) -> dict[str, float]:
    """The largest peaks of all steps."""
    tensors, reserved = (max(peaks) for peaks in zip(*clock.peaks, strict=True))
    return {"peak_gib": round(tensors, 3), "reserved_gib": round(reserved, 3)}


def learning(run: Run) -> dict[str, Any]:
    """First and last loss and the least gradient norm; a `fault` where the loss does not fall, or nothing learns."""
    logs = [log for log in run.trainer.state.log_history if "grad_norm" in log]
    losses, least = [log["loss"] for log in logs], min(log["grad_norm"] for log in logs)
    figures = {"loss_first": round(losses[0], 4), "loss_last": round(losses[-1], 4), "grad_norm_min": round(least, 5)}
    return figures | fault(losses, least)


def fault(losses: Sequence[float], least: float) -> dict[str, str]:
    """What makes a speed worth nothing: a loss that does not fall, a gradient of nothing."""
    if not losses[-1] < losses[0]:
        return {"fault": f"the loss did not fall: {losses[0]:.4f} to {losses[-1]:.4f}"}
    return {} if 0 < least < float("inf") else {"fault": f"a gradient norm of {least}"}


def setting(run: Run, family: str, words: Sequence[str]) -> dict[str, Any]:
    """What `mantis-lite fit` has to know of a run to say its peak elsewhere."""
    packs = largest_packs(run.schedule, run.prepared.train, run.encoder).values()
    kernels = sorted(machine_of(run.recipe, accumulates=False).kernels)  # what is installed here, elsewhere may not be
    found = [asdict(pack) for pack in packs]
    return {"setting": {"family": family, "words": list(words), "kernels": kernels, "packs": found}}


def shown(clock: StepClock) -> None:
    """Print the profiled step's kernels and operators by their own time, and how long the card had nothing to do."""
    assert clock.profiler is not None
    key = "self_device_time_total" if card.there() else "self_cpu_time_total"
    print(clock.profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=90))
    print(
        f"the profiled step: {clock.profiled_seconds:.3f} s, and the card idle for {idle(clock):.1%} of it", flush=True
    )


def idle(clock: StepClock) -> float:
    """The share of the profiled step in which no kernel ran."""
    assert clock.profiler is not None
    kernels = [event for event in clock.profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = until = 0.0
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        busy += max(0.0, event.time_range.end - max(until, event.time_range.start))
        until = max(until, event.time_range.end)
    return 1 - busy / 1e6 / clock.profiled_seconds


def _supervised(run: Run, pack: Sequence[int]) -> int:
    samples = (run.encoder.encode(run.prepared.train[index]) for index in pack)
    return sum(int((sample.labels != IGNORE).sum()) for sample in samples)
