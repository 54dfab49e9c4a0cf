"""This package on the rows, packed or one a pack."""

from __future__ import annotations

import sys
from itertools import accumulate
from typing import Any

from mantis_lite.process import prepare_process

from .probe import RATE, Probe, begin


def run(settings: dict[str, Any], probe: Probe) -> None:
    """Train by a recipe with nothing beside its steps."""
    from mantis_lite.recipe_file import make_recipe
    from mantis_lite.training import plan
    from mantis_lite.training.start import start

    train = {"learning_rate": RATE, "num_train_epochs": 1 + settings["rounds"], "gradient_accumulation_steps": 1}
    quiet = {"save_strategy": "no", "dataloader_num_workers": 0, "report_to": "none"}
    recipe = make_recipe(
        {
            "model": settings["model"],
            "data": {"sources": [{"path": f"{settings['rows']}/ours.json"}], "outside": True},
            "run_dir": settings["out"],
            "method": "lora",
            "lora": {"r": 8, "alpha": 16},
            "prompt": {"system": ""},
            "packing": {"enabled": settings["packing"], "max_length": settings["limit"]},
            "train": train | quiet,
        }
    )
    probe.clock(plan, "prepare")
    run = start(recipe)
    probe.ends = list(accumulate(run.schedule.epoch_sizes))
    run.walk()


if __name__ == "__main__":
    prepare_process()
    run(*begin(sys.argv[1], "mantis-lite", "trl"))
