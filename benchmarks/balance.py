"""By how much the costliest GPU of a run is above the mean, simulated: of each micro-step, and of each step.

What costs is `Cost()`: FLOPs of LLaMA-3 8B with adapters and of a SigLIP tower that is frozen. Run by
benchmarks/planning.py, which has the lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mantis_lite.data.balance import LIMIT
from mantis_lite.data.cost import Cost
from mantis_lite.data.prepare import Samples
from mantis_lite.data.schedule import Schedule, schedule
from mantis_lite.recipe import PackingRecipe

RANKS = (8, 64, 512)
ACCUMULATION = 4
EPOCHS = 3


def of_kinds(kinds: dict[str, Samples]) -> dict[str, Any]:
    """For each kind of picture and number of GPUs: three epochs, and as packs come that nothing is done about."""
    figures: dict[str, Any] = {}
    train = {"num_train_epochs": EPOCHS, "gradient_accumulation_steps": ACCUMULATION}
    for kind, samples in kinds.items():
        costs = Cost().of(samples.lengths)
        plain = schedule(samples, PackingRecipe(), train)
        for ranks in RANKS:
            made = schedule(samples, PackingRecipe(), train, ranks)
            found = above_mean(made, costs, ranks)
            random = above_mean(plain, costs, ranks)
            figures[f"{kind} tokens a picture, {ranks} GPUs"] = {
                "packs": len(made.packs),
                "more_packs": round(len(made.packs) / len(plain.packs) - 1, 5),
                "micro_step": spread(found),
                "step": spread(above_mean(made, costs, ranks, ACCUMULATION)),
                "over_limit": int((found > LIMIT).sum()),
                "last_group": round(last_above_mean(made, costs, ranks), 4),
                "micro_step_unbalanced": spread(random),
            }
            print(kind, ranks, figures[f"{kind} tokens a picture, {ranks} GPUs"], flush=True)
    return figures


def above_mean(made: Schedule, costs: np.ndarray, ranks: int, micro_steps: int = 1) -> np.ndarray:
    """By how much the costliest GPU is above the mean in each (micro-)step but the last."""
    packs = made.packs.sums(costs)
    whole = (len(packs) - 1) // (ranks * micro_steps)
    of_ranks = packs[: whole * ranks * micro_steps].reshape(whole, micro_steps, ranks).sum(1)
    return of_ranks.max(1) / of_ranks.mean(1) - 1


def last_above_mean(made: Schedule, costs: np.ndarray, ranks: int) -> float:
    """That of the last micro-step, in which some GPUs may have nothing to do."""
    packs = made.packs.sums(costs)
    last = packs[(len(packs) - 1) // ranks * ranks :]
    return float(last.max() / (last.sum() / ranks) - 1)


def spread(shares: np.ndarray) -> dict[str, float]:
    """Mean, 99th percentile and most."""
    found = {"mean": shares.mean(), "p99": np.quantile(shares, 0.99), "max": shares.max()}
    return {name: round(float(value), 4) for name, value in found.items()}
