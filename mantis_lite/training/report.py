"""A run's own page, report.html in its folder: written anew while it trains, from what lies there."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerCallback

from ..contract import public_recipe, versions
from ..data.encode import Encoder
from ..data.sample import Sample
from ..errors import SampleError, Stopped
from ..files import write_whole
from ..memory.estimate import GIB, Estimate
from ..pages import thumbnail
from ..recipe import Recipe
from ..yaml_text import dump_yaml
from .page import page
from .run_files import FACTS, PAGE

if TYPE_CHECKING:
    from .run import Run

OFTEN = 10.0
"""Seconds between two writings, at least."""
SHARE = 0.01
"""Of the run's time that is spent on its page at most, but for its first and last writing."""
MOST_ROWS, MOST_PICTURES = 16, 16
"""Held-out rows that are shown with their answers, and pictures of each."""

log = logging.getLogger("mantis_lite")


class Report(TrainerCallback):
    """Keeps report.html current, in no more than a hundredth of the run's time."""

    def __init__(self, run_dir: Path, facts: dict[str, Any]) -> None:
        self.run_dir, self.facts = run_dir, facts
        self.due = 0.0
        self.failed = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.due:
            self.write()

    def begin(self) -> None:
        """Leave the facts of the run in its folder, and the page as it is before the first step."""
        self._keep()
        self.write()

    def end(self, how: str) -> None:
        """Say on the page how the run ended."""
        self.facts["ended"] = {"how": how, "time": time.time()}
        self._keep()
        self.write()

    def write(self) -> None:
        """Write the page; a disk that is full leaves the one before, and the run goes on."""
        begun = time.monotonic()
        self._trying(lambda: write_whole(self.run_dir / PAGE, page(self.run_dir, self.facts), synced=False))
        now = time.monotonic()
        self.due = now + max(OFTEN, (now - begun) / SHARE)

    def _keep(self) -> None:
        self._trying(lambda: write_whole(self.run_dir / FACTS, (json.dumps(self.facts) + "\n").encode()))

    def _trying(self, does: Callable[[], None]) -> None:
        try:
            does()
            self.failed = False
        except OSError as error:
            if not self.failed:
                log.warning("%s cannot be written for now: %s", self.run_dir / PAGE, error.strerror)
            self.failed = True


@contextmanager
def reported(run: Run) -> Iterator[None]:
    """Keep the page of a run while it trains, and say on it how it ended; the first process does."""
    if not run.ranks.is_first:
        yield
        return
    report = Report(run.recipe.run_dir, run.facts)
    run.trainer.add_callback(report)
    report.begin()
    try:
        yield
    except BaseException as error:
        report.end(str(error) if isinstance(error, Stopped) else f"{type(error).__name__}: {error}")
        raise
    report.end("finished")


def run_facts(run: Run) -> dict[str, Any]:
    """What is known of a run before its first step, in JSON: what trains on which rows, and what it should take."""
    recipe, prepared, plan = run.recipe, run.prepared, run.schedule
    return {
        "begun": time.time(),
        "model": run.checkpoint.public_name,
        "steps": plan.steps,
        "from_step": run.resumed.step,
        "packs": len(plan.packs),
        "per_step": plan.per_step,
        "gpus": run.ranks.size,
        "rows": {
            "read": prepared.rows_read,
            "to train on": len(prepared.train),
            "held out": len(prepared.held_out) if prepared.held_out is not None else 0,
            "rejected": len(prepared.rejects),
            "dropped as larger than a pack": prepared.oversize,
        },
        "parts": [size._asdict() for size in run.sizes],
        "notices": [*run.notices, *(f"{count:,} times: {notice}" for notice, count in prepared.notices.items())],
        "estimate": _estimated(run.estimate),
        "machine": machine(run.on_gpu),
        "versions": versions(),
        "next": commands(recipe),
        "recipe": dump_yaml(public_recipe(recipe, run.checkpoint)),  # pages are passed on: no path of this machine
        "answered": [_asked(run.encoder, sample) for sample in run.answered[:MOST_ROWS]],
        "answered_left": max(0, len(run.answered) - MOST_ROWS),
    }


def machine(gpu: bool) -> str:
    """What the run is on, in words."""
    if gpu:
        return f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / GIB:.1f} GiB"
    return f"{psutil.cpu_count()} CPUs"


def commands(recipe: Recipe) -> dict[str, list[tuple[str, str]]]:
    """What to type next, each with what it is for: of a run that was not finished, and of one that was."""
    folder = shlex.quote(str(recipe.run_dir))
    held_out = recipe.data.eval if isinstance(recipe.data.eval, str) else "FILE"
    finished = [("ask it", f"mantis-lite chat {folder}")]
    if recipe.task == "classify":
        finished = [("score rows", f"mantis-lite predict {folder} data={shlex.quote(held_out)} --metrics")]
    elif recipe.task in ("chat", "video"):
        finished.append(("say how right it is", f"mantis-lite evaluate {folder} data={shlex.quote(held_out)}"))
    if recipe.method != "full":
        finished.append(("merge it into its base", f"mantis-lite merge {folder}"))
    if recipe.task in ("chat", "video"):
        finished.append(("serve it", f"mantis-lite serve {folder}"))
    finished.append(("put it on the hub", f"mantis-lite push {folder} user/name --dry-run"))
    going_on = f"mantis-lite train {shlex.quote(str(recipe.run_dir / 'recipe.yaml'))}"
    return {"stopped": [("go on where it stopped", going_on)], "finished": finished}


def _estimated(found: Estimate | str | None) -> dict[str, Any] | None:
    """GiB of a GPU: what tensors should take, and all that goes with them."""
    if found is None:
        return None
    if isinstance(found, str):
        return {"why_not": found}
    return {"tensors": found.allocated / GIB, "total": found.total / GIB}


def _asked(encoder: Encoder, sample: Sample) -> dict[str, Any]:
    """A held-out row that is answered again and again: its pictures, small, as far as they can be had."""
    laid_out = encoder.frames.lay_out(sample)
    try:
        pictures = encoder.frames.open(laid_out, encoder.max_image_size, laid_out.images[:MOST_PICTURES])
    except SampleError:  # the evaluation, which needs all of it, will say so
        pictures = []
    left = len(laid_out.images) - len(pictures)
    return {"where": sample.where, "id": sample.id, "pictures": [thumbnail(each) for each in pictures], "left": left}
