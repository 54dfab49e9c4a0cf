"""Packing the lengths of a whole Mantis-Instruct: time and fill.

    python -m benchmarks.planning [LENGTHS.npz]

The file holds `text_tokens` and `images` of each sample. Without one, 720,548 lengths are drawn: log-normal text and
1-6 images. The bound is one global best-fit-decreasing pass over single samples, with neither groups nor patches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np

from mantis_lite.data.packing import Length, fill, plan

from . import results

MAX_LENGTH = 8192
REPEATS = 5


def read(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens and images a sample."""
    if path is not None:
        stored = np.load(path)
        return stored["text_tokens"].astype(np.int64), stored["images"].astype(np.int64)
    random = np.random.default_rng(0)
    return random.lognormal(6, 0.6, 720_548).astype(np.int64), random.integers(1, 7, 720_548)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lengths", type=Path, nargs="?")
    text, images = read(parser.parse_args().lengths)
    figures = {}
    for name, per_image, patches in (("siglip", 728, 729), ("clip", 576, 577)):
        tokens = np.minimum(text + images * per_image, MAX_LENGTH)
        lengths = np.stack([tokens, images * patches], axis=1)
        seconds = []
        for repeat in range(REPEATS):
            begun = time.perf_counter()
            packs = plan(lengths, Length(MAX_LENGTH, 0), seed=repeat)
            seconds.append(time.perf_counter() - begun)
        bound = best_fit_decreasing(tokens)
        figures[name] = {
            "samples": len(tokens),
            "seconds_median": round(statistics.median(seconds), 3),
            "seconds_min": round(min(seconds), 3),
            "seconds_max": round(max(seconds), 3),
            "packs": len(packs),
            "fill": round(fill(lengths, len(packs), MAX_LENGTH), 5),
            "fill_of_global_best_fit_decreasing": round(fill(lengths, bound, MAX_LENGTH), 5),
        }
        print(name, figures[name])
    results.write("planning", figures)


if __name__ == "__main__":
    main()
