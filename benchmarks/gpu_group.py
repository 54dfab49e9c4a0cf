"""The cases of one group in this process, for `benchmarks.gpu`: a line in a file where each begins and ends."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mantis_lite.errors import OutOfMemory, RecipeError

from .gpu_cases import GROUPS, Case
from .gpu_models import Place


def figures_of(case: Case, place: Place, deadline: float, asked: bool) -> dict[str, Any]:
    """A case's figures, or why there are none; what is not foreseen ends the process."""
    if case.long and not (place.full or place.small or asked):
        return {"not run": "--full alone"}
    if time.time() + case.seconds > deadline:
        return {"not run": "time"}
    begun = time.perf_counter()
    try:
        figures = case.measure(place)
        took, allocator = round(time.perf_counter() - begun, 1), os.environ.get("PYTORCH_ALLOC_CONF", "")
        return figures | {"case_seconds": took, "allocator": allocator}
    except (OutOfMemory, torch.OutOfMemoryError) as error:
        return {"out_of_memory": str(error)[:400]}
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    except RecipeError as error:
        return {"failed": str(error)}


def main() -> None:
    name, first, deadline, file, wanted, *flags = sys.argv[1:]
    # All is imported by now, and the card is another group's until it is this one's turn.
    if not sys.stdin.readline():
        return
    with tempfile.TemporaryDirectory() as folder, Path(file).open("a", buffering=1) as lines:
        place = Place(Path(folder), small="tiny" in flags, full="full" in flags, profile="profile" in flags)
        found = [case for case in GROUPS[name] if re.search(wanted, f"{name} {case.name}")]
        cases = found[:1] if place.profile else found
        for case in cases[int(first) :]:
            lines.write(json.dumps({"case": case.name, "seconds": case.seconds, "figures": None}) + "\n")
            figures = figures_of(case, place, float(deadline), bool(wanted))
            lines.write(json.dumps({"case": case.name, "figures": figures}) + "\n")


if __name__ == "__main__":
    main()
