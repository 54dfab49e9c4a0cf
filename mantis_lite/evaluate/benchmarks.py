"""The benchmarks there are."""

from __future__ import annotations

from ..errors import RecipeError, did_you_mean
from .benchmark import Benchmark
from .blink import BLINK
from .mantis_eval import MANTIS_EVAL
from .mementos import MEMENTOS
from .mvbench import MVBENCH
from .nlvr2 import NLVR2
from .qbench2 import QBENCH2

BENCHMARKS = {each.name: each for each in (MANTIS_EVAL, NLVR2, QBENCH2, BLINK, MVBENCH, MEMENTOS)}


def find(name: str) -> Benchmark:
    """A benchmark by its name. Raises RecipeError."""
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise RecipeError(f"{name}: no such benchmark{did_you_mean(name, BENCHMARKS)}\n  There are: {known}.")
    return BENCHMARKS[name]
