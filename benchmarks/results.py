"""Ways that take turns, what was measured on what, and where the figures go."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared/data"
"""Real rows and lengths, beside a checkout that has them."""
REPEATS = 5
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "triton",
    "liger-kernel",
    "tokenizers",
    "datasets",
    "pillow",
    "av",
    "numpy",
    "simplejpeg",
    "matplotlib",
    "binpacking",
)


def interleaved(
    ways: Mapping[str, Callable[[], Any]],
    repeats: int = REPEATS,
    same: Callable[[list[Any]], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each way, which take turns so many times; with `warm` once more before, which is left out.

    Each begins a turn in its turn, so that none has another's caches and memory always. `same` is given what they
    returned in each turn, in the order of the ways, and raises where that is not the same.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1 if warm else 0, repeats):
        first = max(turn, 0) % len(ways)
        found = {}
        for name in [*ways][first:] + [*ways][:first]:
            begun = clock()
            found[name] = ways[name]()
            if turn >= 0:
                seconds[name].append(clock() - begun)
        if same is not None:
            same([found[name] for name in ways])
    return seconds


def quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Turn by turn: both were measured one after the other, when the machine was as busy."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum, to four digits, and of how many."""
    found = list(values)
    edges = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    return {name: float(f"{value:.4g}") for name, value in edges.items()} | {"n": len(found)}


def installed(name: str) -> str | None:
    """A package's version, where there is one: triton and liger-kernel are a GPU's, av may be missing there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The device, its software and the date, and how long this process has been at it."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "date": date.today().isoformat(),
        "seconds": round(time.time() - psutil.Process().create_time()),
        "device": device,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": dict(filter(all, ((name, installed(name)) for name in PACKAGES))),
    }


def write(name: str, figures: dict[str, Any], folder: Path | None = None) -> Path:
    """Write figures with the machine they were measured on; returns the file."""
    folder = folder or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(machine() | {"figures": figures}, indent=2) + "\n")
    return path
