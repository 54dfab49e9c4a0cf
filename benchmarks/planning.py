"""Packing the 720,548 lengths of Mantis-Instruct: seconds and fill, against what others pack with.

    python -m benchmarks.planning [--lengths LENGTHS.npz]
    python -m benchmarks.planning --large [ROWS ...]

The file holds `text_tokens` and `images` of each sample; without one, 720,548 are drawn: log-normal text and 1-6
images. Ways take turns: `plan` over all samples at once; TRL's `pack_dataset` ("bfd") on rows of so many zeros of one
byte; binpacking's `to_constant_volume`, as ms-swift calls it; the knapsack that LLaMA-Factory describes, the largest
that fits first; and next-fit, as upstream goes on to another row once one is over. Others but the last see windows of
1,000 samples, so that SOME of them are enough to know their speed. Each must hold every sample once and no pack may be
too long. The bound of the fill is one global best-fit-decreasing pass over single samples, without patches.

Balance is by how much GPUs wait for each other, simulated (`balance.py`). Large are as many rows as 100 million, drawn
from these with replacement: for each number of rows one process packs an epoch for one GPU, and then lays out a run of
an epoch for eight; its peak is its own, with Python, numpy and the lengths, (rows, 2) int64.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import binpacking
import numpy as np
import pyarrow
from datasets import Dataset, disable_progress_bars
from trl import pack_dataset

from mantis_lite.cycles import no_cycle_collection
from mantis_lite.data.packing import Length, fill, longest_first, plan
from mantis_lite.data.packs import Packs
from mantis_lite.data.prepare import Samples
from mantis_lite.data.schedule import schedule
from mantis_lite.recipe import PackingRecipe

from . import balance, results

LENGTHS = results.SHARED / "lengths/lengths-720548.npz"
MAX_LENGTH = 8192
ALL = 720_548
LARGE = (ALL, 10_000_000, 100_000_000)
WINDOW, SOME = 1000, 20_000
KINDS = {"64": (64, 1000), "576": (576, 577), "728": (728, 729)}
"""Tokens of a picture and its positions in the tower: Idefics2's, about the mean of its shapes; CLIP's; SigLIP's."""


def read(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens and images a sample."""
    if path is not None and path.is_file():
        with np.load(path) as stored:
            return stored["text_tokens"], stored["images"]
    random = np.random.default_rng(0)
    return random.lognormal(6, 0.6, ALL).astype(np.int32), random.integers(1, 7, ALL, dtype=np.int32)


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


def laid_out(path: Path | None, rows: int) -> dict[str, Any]:
    """What planning so many rows takes, in this process; GB are 10^9 bytes."""
    begun = time.perf_counter()
    samples = samples_of(path, "728", rows)
    read, made = time.perf_counter(), peak()
    packs = plan(samples.lengths, Length(MAX_LENGTH, 0), seed=42)
    packed, first = time.perf_counter(), len(packs)
    filled = fill(samples.lengths, first, MAX_LENGTH)
    del packs
    run = schedule(samples, PackingRecipe(), {"num_train_epochs": 1}, ranks=8)
    done = time.perf_counter()
    return {
        "rows": rows,
        "seconds_lengths": round(read - begun, 2),
        "seconds_packs": round(packed - read, 2),
        "seconds_schedule_8_gpus": round(done - packed, 2),
        "gb_with_lengths": round(made, 2),
        "gb_peak": round(peak(), 2),
        "gb_packs": round((run.packs.members.nbytes + run.packs.ends.nbytes) / 1e9, 3),
        "packs": first,
        "packs_8_gpus": len(run.packs),
        "fill": round(filled, 5),
    }


def peak() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def planner(tokens: np.ndarray) -> Packs:
    """What this package packs with."""
    return plan(np.stack([tokens, 0 * tokens], axis=1), Length(MAX_LENGTH, 0), seed=0)


def ordered(tokens: np.ndarray) -> np.ndarray:
    """What a plan over all samples begins with."""
    return longest_first(tokens, 0 * tokens, MAX_LENGTH, np.random.default_rng(0))


def trl(tokens: np.ndarray) -> list[list[int]]:
    """The lengths in each of TRL's packs; it takes tokens, and packs 1,000 rows of a data set at a time."""
    ends = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int32)
    rows = pyarrow.ListArray.from_arrays(ends, np.zeros(ends[-1], dtype=np.int8))
    packed = pack_dataset(Dataset(pyarrow.table({"input_ids": rows})), MAX_LENGTH, "bfd", {"keep_in_memory": True})
    return packed.data.column("seq_lengths").to_pylist()


def ms_swift(tokens: np.ndarray) -> list[list[int]]:
    packs = []
    for begin in range(0, len(tokens), WINDOW):
        rows = list(enumerate(tokens[begin : begin + WINDOW].tolist()))
        packs += binpacking.to_constant_volume(rows, MAX_LENGTH, weight_pos=1)
    return [[size for _, size in pack] for pack in packs]


def llama_factory(tokens: np.ndarray) -> list[list[int]]:
    packs = []
    for begin in range(0, len(tokens), WINDOW):
        left = sorted(tokens[begin : begin + WINDOW].tolist())
        while left:
            pack: list[int] = []
            room = MAX_LENGTH
            while at := bisect_right(left, room):
                pack.append(left.pop(at - 1))
                room -= pack[-1]
            packs.append(pack)
    return packs


def upstream(tokens: np.ndarray) -> list[list[int]]:
    """Next-fit, which does not look back; upstream's own goes over the limit before it stops."""
    packs: list[list[int]] = [[]]
    room = MAX_LENGTH
    for size in tokens.tolist():
        if size > room:
            packs.append([])
            room = MAX_LENGTH
        packs[-1].append(size)
        room -= size
    return packs


OTHERS: dict[str, tuple[Callable[[np.ndarray], list[list[int]]], int]] = {
    "TRL, pack_dataset": (trl, SOME),
    "ms-swift, binpacking": (ms_swift, SOME),
    "LLaMA-Factory, knapsack": (llama_factory, ALL),
    "upstream, next-fit": (upstream, ALL),
}
"""What packs, and how many of the samples it is given."""


def packers(path: Path | None) -> dict[str, Any]:
    """All ways in turn at 576 tokens a picture: samples a second, how many times `plan` is faster, and the fill.

    And how long it takes to put all samples in order, with which a plan begins.
    """
    tokens = samples_of(path, "576").lengths[:, 0]
    given = {name: tokens[:: len(tokens) // rows] for name, (_, rows) in OTHERS.items()}
    ways: dict[str, Callable[[], Any]] = {"plan": lambda: planner(tokens), "order": lambda: ordered(tokens)}
    ways |= {name: lambda pack=pack, name=name: pack(given[name]) for name, (pack, _) in OTHERS.items()}  # type: ignore[misc]
    counts: dict[str, int] = {}

    def sound(found: list[Any]) -> None:
        own, _, *others = found
        assert (np.bincount(own.members, minlength=len(tokens)) == 1).all() and own.sums(tokens).max() <= MAX_LENGTH
        for (name, sizes), packs in zip(given.items(), others, strict=True):
            assert sorted(size for pack in packs for size in pack) == sorted(sizes.tolist()), name
            assert max(map(sum, packs)) <= MAX_LENGTH, name
            counts[name] = len(packs)
        counts["plan"] = len(own)

    with no_cycle_collection():  # which others would take longer for, as all their packs are kept here
        seconds = results.interleaved(ways, same=sound)
    order = results.spread(seconds.pop("order"))
    each = {name: [s / len(given.get(name, tokens)) for s in found] for name, found in seconds.items()}
    measured = {
        name: {
            "samples": len(given.get(name, tokens)),
            "samples_per_second": results.spread(1 / s for s in each[name]),
            "times_as_long_as_plan": results.spread(results.quotients(each[name], each["plan"])),
            "fill": round(float(given.get(name, tokens).sum() / (count * MAX_LENGTH)), 5),
        }
        for name, count in counts.items()
    }
    return {"packers": measured, "order_seconds": order}


def planned(path: Path | None) -> dict[str, Any]:
    """Seconds that `plan` takes for all samples, the kinds of pictures in turn; its packs, and those of the bound."""
    of = {kind: samples_of(path, kind).lengths for kind in KINDS}
    first: dict[str, Packs] = {}

    def same(found: list[Packs]) -> None:
        for kind, packs in zip(KINDS, found, strict=True):
            assert np.array_equal(first.setdefault(kind, packs).members, packs.members)

    def ways(kind: str) -> Callable[[], Packs]:
        return lambda: plan(of[kind], Length(MAX_LENGTH, 0), seed=0)

    seconds = results.interleaved({kind: ways(kind) for kind in KINDS}, same=same)
    return {
        kind: {
            "samples": len(lengths),
            "seconds": results.spread(seconds[kind]),
            "packs": len(first[kind]),
            "fill": round(fill(lengths, len(first[kind]), MAX_LENGTH), 5),
            "fill_of_global_best_fit_decreasing": round(
                fill(lengths, best_fit_decreasing(lengths[:, 0]), MAX_LENGTH), 5
            ),
        }
        for kind, lengths in of.items()
    }


def large(path: Path | None, rows: Sequence[int]) -> dict[str, Any]:
    figures = {}
    for count in rows:
        command = [sys.executable, "-m", "benchmarks.planning", str(count), "--one"]
        command += ["--lengths", str(path)] if path else []
        figures[f"{count:,} rows"] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        print(figures[f"{count:,} rows"], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, default=LENGTHS)
    parser.add_argument("--large", action="store_true", help="time and memory of many rows")
    parser.add_argument("--one", action="store_true", help="lay out so many rows in this process")
    parser.add_argument("rows", type=int, nargs="*", default=LARGE)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(laid_out(asked.lengths, asked.rows[0])))
    elif asked.large:
        results.write("planning_large", large(asked.lengths, asked.rows))
    else:
        disable_progress_bars()
        figures = {"plan": planned(asked.lengths)} | packers(asked.lengths)
        print(json.dumps(figures, indent=1))
        kinds = {kind: samples_of(asked.lengths, kind) for kind in KINDS}
        results.write("planning", figures | {"balance": balance.of_kinds(kinds)})


if __name__ == "__main__":
    main()
