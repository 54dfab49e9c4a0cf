"""The same faults to a run of transformers' Trainer, the usual way, and to one of this package, side by side.

    python -m benchmarks.reliability [--kills 500] [--flips 200] [--only killed]

Runs are small (`benchmarks.sides`) and trained in forked processes on the CPU. Figures are written when all of it has
run; --only prints.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from . import results, saves
from .forks import Forks
from .sides import ROWS_A_STEP, STEPS, Side

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
TRIALS = 10
"""Of each signal."""
CANARY = "hf_" + "canary" * 6
"""In the place of a token of the hub."""


def killed(count: int, side: Side) -> dict[str, Any]:
    """Kill runs of twice as many steps at random moments, start them again until they end, and compare.

    Every step is saved: the most that a kill can fall into. `lost` are steps that were taken and are taken again.
    """
    rows = 2 * STEPS * ROWS_A_STEP
    seconds = side.straight("straight", rows=rows)["seconds"]
    drawn = np.random.default_rng(0)
    found: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    lost, runs = 0, 0
    while found["kills"] < count:
        name, progress = f"killed-{runs}", side.folder / f"progress-{runs}"
        done = side(name, rows, progress=str(progress), kill_after=drawn.uniform(0.05, 0.95) * seconds)
        notes = progress.read_text().split("\n")[:-1] if progress.exists() else []
        found["kills"] += done["status"] == -signal.SIGKILL
        found["kills_in_a_save"] += done["status"] == -signal.SIGKILL and bool(notes) and notes[-1].startswith("step")
        # A run of this package is over with its adapter, which is there as a whole or not at all.
        ends = done["status"] == 0 or (not side.stock and (side.run_dir(name) / "adapter").exists())
        if ends:
            found["runs_that_ended_otherwise"] += not side.same(name, "straight")
        elif done["status"] != -signal.SIGKILL:
            faults[_error(done)] += 1
        if ends or done["status"] != -signal.SIGKILL:
            found["runs"] += 1
            lost = max(lost, _lost(notes))
            shutil.rmtree(side.run_dir(name))
            runs += 1
    return dict(found) | {"cannot_resume": sum(faults.values()), "errors": dict(faults), "lost_steps_at_most": lost}


def _lost(notes: list[str]) -> int:
    """How many steps a run took twice at most, after one kill."""
    taken, lost = 0, 0
    for what, step in (note.split() for note in notes):
        if what == "begin":
            lost = max(lost, taken - int(step))
        if what != "saved":
            taken = int(step)
    return lost


def _error(done: dict[str, Any]) -> str:
    """The kind of error that a run ended with."""
    kinds = [line.split(":")[0] for line in done["said"].splitlines() if line.split(":")[0].isidentifier()]
    return kinds[-1] if kinds else f"status {done['status']}"


def flipped(count: int, side: Side) -> dict[str, int]:
    """Flip a bit of the newest of two checkpoints, half of them in its small files, and go on."""
    side.straight("straight")
    side("stopped", kill_at=STEPS - 2)
    stopped, trial = side.run_dir("stopped"), side.run_dir("trial")
    files = sorted(file for file in (stopped / f"checkpoint-{STEPS - 2}").rglob("*") if file.is_file())
    sizes = np.array([file.stat().st_size for file in files])
    drawn = np.random.default_rng(0)
    found: Counter[str] = Counter()
    for at in range(count):
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(stopped, trial)
        among = sizes if at % 2 else np.where(sizes < 10_000, sizes, 0)
        file = trial / files[drawn.choice(len(files), p=among / among.sum())].relative_to(stopped)
        content = bytearray(file.read_bytes())
        content[drawn.integers(len(content))] ^= 1 << int(drawn.integers(8))
        file.write_bytes(content)
        done = side("trial")
        if done["status"]:
            found["cannot resume"] += 1
        else:
            how = "the older one taken" if f"checkpoint-{STEPS - 2} is skipped" in done["said"] else "not noticed"
            found[f"{how}, {'the same result' if side.same('trial', 'straight') else 'another result'}"] += 1
    return dict(found)


def signalled(side: Side) -> dict[str, Any]:
    """Each signal, in the middle of one of the first steps of a run that saves none of itself."""
    side.straight("straight")
    found = {}
    for name in SIGNALS:
        number = getattr(signal, name)
        outcomes: Counter[str] = Counter()
        for trial in range(TRIALS):
            step = 1 + trial % (STEPS - 1)
            run_name = f"{name}-{trial}"
            done = side(run_name, train={"save_steps": 100}, signals=[(step, number)])
            saved = (side.run_dir(run_name) / f"checkpoint-{step}").exists()
            outcomes[f"exit {done['status']}, step {'saved' if saved else 'lost'}"] += 1
            if saved:
                side.straight(run_name, train={"save_steps": 100})
                outcomes["goes on the same"] += side.same(run_name, "straight")
        found[name] = dict(outcomes)
    return found


def poisoned(side: Side) -> dict[str, Any]:
    """Weights, or one gradient, that are not numbers from step 3 on."""
    found = {}
    for what in ("weights", "gradient"):
        done = side(what, poison=(3, what))
        logged = [loss for step, loss in side.losses(what) if step >= 3]
        files = [file for file in side.run_dir(what).rglob("*.safetensors") if not _finite(file)]
        found[what] = {
            "status": done["status"],
            "logged_from_step_3": ["NaN" if np.isnan(loss) else loss for loss in logged],
            "files_saved_with_nan": len(files),
            "said": [line for line in done["said"].splitlines() if "finite" in line or "NaN" in line],
        }
    return found


def _finite(file: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())


def resumed(side: Side) -> dict[str, Any]:
    """Kill a run at each step of an epoch and go on: which losses after it are others than of a run that was not.

    Dropout is on; the stock side also with rows that draw from the global generator as they are read.
    """
    found = {}
    for augment in (False, True) if side.stock else (False,):
        for workers in (0, 2):
            kind = f"{'augmented, ' if augment else ''}{workers} workers"
            settings: dict[str, Any] = {"train": {"dataloader_num_workers": workers}, "augment": augment}
            side.straight(f"straight, {kind}", **settings)
            expected = dict(side.losses(f"straight, {kind}"))
            counts: Counter[str] = Counter()
            for step in range(1, STEPS):
                name = f"{kind}, {step}"
                side(name, kill_at=step, **settings)
                side.straight(name, **settings)
                after = [(at, loss) for at, loss in side.losses(name) if at > step]
                counts["losses_after"] += len(after)
                counts["others"] += sum(expected[at] != loss for at, loss in after)
                counts["other_weights"] += side.weights(name) != side.weights(f"straight, {kind}")
            found[kind] = {"kills": STEPS - 1} | dict(counts)
    return found


def secret(side: Side) -> dict[str, Any]:
    """A token of the hub, in the environment and, where it is taken, among the arguments: in which files it is."""
    train = {"hub_token": CANARY}
    refused = not side.stock and side("asked", train=train)["status"]
    side.straight("told", environment={"HF_TOKEN": CANARY}, train=train if side.stock else {})
    files = [file for file in side.run_dir("told").rglob("*") if file.is_file()]
    hits = Counter(file.name for file in files if CANARY.encode() in file.read_bytes())
    return {"files": len(files), "with_the_token": dict(hits), "exit_code_of_a_token_in_the_settings": refused or None}


def bereft(side: Side) -> dict[str, Any]:
    """A DataLoader worker is killed once, in the second of 24 steps."""
    settings: dict[str, Any] = {"rows": 96, "train": {"dataloader_num_workers": 2, "save_steps": 100}}
    side.straight("with all", **settings)
    done = side("bereft", kill_worker=2, **settings)
    ends = done["status"] == 0
    return {
        "status": done["status"],
        "error": None if ends else _error(done),
        "the_same": ends and side.same("bereft", "with all"),
    }


def saving(side: Side) -> dict[str, Any]:
    """Saves that end at any call, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(saves.measure, (side.stock, side.folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--only")
    args = parser.parse_args()
    rows = {row.__name__: row for row in (secret, poisoned, bereft, saving, signalled, resumed)}
    rows |= {"flipped": partial(flipped, args.flips), "killed": partial(killed, args.kills)}
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MANTIS_LITE_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with Forks() as forks:
            for name in [args.only] if args.only else rows:
                figures[name] = {}
                for stock in (True, False):
                    own = Path(folder) / f"{name}-{stock}"
                    own.mkdir()
                    found = rows[name](Side(forks, own, stock))
                    figures[name]["stock" if stock else "mantis_lite"] = found
                    print(json.dumps({name: found}), flush=True)
    if not args.only:
        results.write("reliability", figures)


if __name__ == "__main__":
    main()
