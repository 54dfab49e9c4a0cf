"""What `mantis-lite fit` says of the runs in gpu.json, beside what they took; it needs no GPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mantis_lite.memory.estimate import GIB, estimate
from mantis_lite.memory.step import Pack, machine_of
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe import ModelRecipe
from mantis_lite.recipe_file import load_recipe

from .gpu_models import small_files
from .gpu_step import RECIPES


def add_estimates(file: Path) -> None:
    """Write `estimated_gib` and `error` beside every peak of the file, and print them."""
    measured = json.loads(file.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for group, cases in measured["figures"].items():
            for name, figures in cases.items():
                for found, packs in peaks(figures):
                    found |= estimated(figures["setting"], packs, found["peak_gib"], Path(folder))
                    shown = {key: found[key] for key in ("peak_gib", "reserved_gib", "estimated_gib", "error")}
                    print(group, name, packs[0].tokens, shown, flush=True)
                    file.write_text(json.dumps(measured, indent=2) + "\n")


def peaks(figures: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[Pack]]]:
    """Where a case has a peak, and the packs it may be of."""
    if "setting" not in figures:
        return
    if "by_length" in figures:
        for length, found in figures["by_length"].items():
            yield found, [Pack(int(length), int(length), int(length))]
    else:
        packs = figures["setting"]["packs"]
        yield figures, [Pack(**pack | {"grids": tuple(map(tuple, pack["grids"]))}) for pack in packs]


def estimated(setting: dict[str, Any], packs: list[Pack], peak: float, folder: Path) -> dict[str, float]:
    """The largest estimate of these packs, in GiB of tensors, and by how much of the peak it is off."""
    family = setting["family"]
    model = small_files(family, folder / family)
    recipe = load_recipe(RECIPES[family], [f"model={model}", "data=none.json", *setting["words"]])
    checkpoint = open_checkpoint(ModelRecipe(name=str(model)))
    machine = replace(machine_of(recipe, accumulates=False), kernels=frozenset(setting["kernels"]))
    found = [estimate(checkpoint.config, recipe, pack, machine, checkpoint.family) for pack in packs]
    most = max(each.allocated for each in found) / GIB
    return {"estimated_gib": round(most, 3), "error": round(most / peak - 1, 4)}
