"""Packing and laying out the lengths of Mantis-Instruct, and of as many rows as 100 million: time, memory and fill.

    python -m benchmarks.planning [--lengths LENGTHS.npz] [ROWS ...]

The file holds `text_tokens` and `images` of each sample; without one, 720,548 are drawn: log-normal text and 1-6
images. More rows than that are drawn from these with replacement. For each number of rows, one process packs an epoch
for one GPU, and then lays out a run of an epoch for eight; its peak is its own, with Python, numpy and the lengths,
(rows, 2) int64. The bound of the fill is one global best-fit-decreasing pass over single samples, without patches.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from bisect import bisect_left, insort
from pathlib import Path
from typing import Any

import numpy as np

from mantis_lite.data.packing import Length, fill, plan
from mantis_lite.data.prepare import Samples
from mantis_lite.data.schedule import schedule
from mantis_lite.recipe import PackingRecipe

from . import balance, results

MAX_LENGTH = 8192
ROWS = (720_548, 10_000_000, 100_000_000)
KINDS = {"64": (64, 1000), "576": (576, 577), "728": (728, 729)}
"""Tokens of a picture and its positions in the tower: Idefics2's, about the mean of its shapes; CLIP's; SigLIP's."""


def read(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens and images a sample."""
    if path is not None:
        with np.load(path) as stored:
            return stored["text_tokens"], stored["images"]
    random = np.random.default_rng(0)
    return random.lognormal(6, 0.6, ROWS[0]).astype(np.int32), random.integers(1, 7, ROWS[0], dtype=np.int32)


def samples_of(path: Path | None, kind: str, rows: int | None = None) -> Samples:
    """Samples that are lengths alone, capped at a pack's; `rows` of them, or all that were read."""
    text, images = read(path)
    if rows is not None and rows != len(text):
        drawn = np.random.default_rng(0).integers(0, len(text), rows, dtype=np.int32)
        text, images = text[drawn], images[drawn]
    tokens, patches = KINDS[kind]
    lengths = np.empty((len(text), 2), dtype=np.int64)
    lengths[:, 0] = np.minimum(text + images.astype(np.int64) * tokens, MAX_LENGTH)
    lengths[:, 1] = images.astype(np.int64) * patches
    none = np.zeros(len(text), dtype=np.int8)
    return Samples([], [1.0], none, none, lengths, none, none)


def best_fit_decreasing(tokens: np.ndarray) -> int:
    """The packs of the textbook algorithm, one sample at a time."""
    rooms: list[int] = []
    packs = 0
    for size in np.sort(tokens)[::-1].tolist():
        at = bisect_left(rooms, size)
        room = rooms.pop(at) if at < len(rooms) else MAX_LENGTH
        packs += room == MAX_LENGTH
        if room > size:
            insort(rooms, room - size)
    return packs


def planned(path: Path | None, rows: int) -> dict[str, Any]:
    """What planning so many rows takes, in this process; GB are 10^9 bytes."""
    begun = time.perf_counter()
    samples = samples_of(path, "728", rows)
    read, made = time.perf_counter(), peak()
    packs = plan(samples.lengths, Length(MAX_LENGTH, 0), seed=42)
    packed, first = time.perf_counter(), len(packs)
    filled = fill(samples.lengths, first, MAX_LENGTH)
    del packs
    laid_out = schedule(samples, PackingRecipe(), {"num_train_epochs": 1}, ranks=8)
    done = time.perf_counter()
    return {
        "rows": rows,
        "seconds_lengths": round(read - begun, 2),
        "seconds_packs": round(packed - read, 2),
        "seconds_schedule_8_gpus": round(done - packed, 2),
        "gb_with_lengths": round(made, 2),
        "gb_peak": round(peak(), 2),
        "gb_packs": round((laid_out.packs.members.nbytes + laid_out.packs.ends.nbytes) / 1e9, 3),
        "packs": first,
        "packs_8_gpus": len(laid_out.packs),
        "fill": round(filled, 5),
    }


def peak() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def filled(path: Path | None) -> dict[str, Any]:
    """Packs of the file's own rows, and of the bound."""
    figures = {}
    for kind in KINDS:
        lengths = samples_of(path, kind).lengths
        packs, bound = len(plan(lengths, Length(MAX_LENGTH, 0), seed=0)), best_fit_decreasing(lengths[:, 0])
        figures[kind] = {
            "packs": packs,
            "fill": round(fill(lengths, packs, MAX_LENGTH), 5),
            "fill_of_global_best_fit_decreasing": round(fill(lengths, bound, MAX_LENGTH), 5),
        }
        print(kind, figures[kind], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--one", action="store_true", help="plan so many rows in this process")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(planned(asked.lengths, asked.rows[0])))
        return
    times = {}
    for rows in asked.rows:
        command = [sys.executable, "-m", "benchmarks.planning", str(rows), "--one"]
        command += ["--lengths", str(asked.lengths)] if asked.lengths else []
        times[f"{rows:,} rows"] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        print(times[f"{rows:,} rows"], flush=True)
    kinds = {kind: samples_of(asked.lengths, kind) for kind in KINDS}
    results.write("planning", {"time": times, "fill": filled(asked.lengths), "balance": balance.of_kinds(kinds)})


if __name__ == "__main__":
    main()
