"""Train with each tool on the same rows by turns, and write what was measured and the table of it.

    python -m benchmarks.peers [--rounds 5] [--rows 8] [--only ours "swift, 1 row"]

Needs the environments that `make peers` makes; a tool without one is left out. --only takes tools or cases by name, and
leaves what was measured of the others as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import results
from . import table
from .cases import CASES, Case
from .model import write_model
from .rows import EXAMPLES, drawn, real, wrapped, write
from .worker import Worker, python

LIMIT = 8192
"""Tokens of a row or a pack at most."""


def setting(folder: Path, count: int, threads: int, side: int = 384) -> dict[str, Any]:
    """Write the model and the rows to a folder, and say what they come to."""
    rows = real(count) if EXAMPLES.exists() else drawn(count, folder)
    write(rows, folder)
    write_model(folder / "model", [text for row in rows for _, text in wrapped(row)], side)
    lengths, labels = counted(folder)
    return {
        "rows": len(rows),
        "from": "Mantis' example rows" if EXAMPLES.exists() else "drawn rows",
        "pictures": sum(len(row.pictures) for row in rows),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "label_tokens": labels,
        "limit": LIMIT,
        "threads": threads,
    }


def counted(folder: Path) -> tuple[list[int], int]:
    """How long rows are by this package's own encoding, and how many of all their tokens carry loss."""
    from mantis_lite.data.paths import MediaFolder
    from mantis_lite.data.schema import parse
    from mantis_lite.models.checkpoint import open_checkpoint
    from mantis_lite.recipe import ModelRecipe
    from mantis_lite.recipe_file import load_recipe

    recipe = load_recipe("chat", [f"model={folder}/model", f"data={folder}/ours.json", 'prompt.system=""'])
    encoder = open_checkpoint(ModelRecipe(name=f"{folder}/model")).encoder(recipe)
    rows = json.loads((folder / "ours.json").read_text())
    found = [encoder.encode(parse(row, "row", MediaFolder(folder, outside=True))) for row in rows]
    return [len(row) for row in found], sum(int((row.labels != -100).sum()) for row in found)


def measured(cases: Sequence[Case], folder: Path, told: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Every case's rounds, which are taken by turns; of a case that ends before them, what it said."""
    settings = {"model": f"{folder}/model", "rows": str(folder), "rounds": rounds, "limit": told["limit"]}
    found: dict[str, Any] = {}
    begun = datetime.now().isoformat(timespec="seconds")
    with ExitStack() as running:
        workers = []
        for case in cases:
            worker = Worker(case, settings, folder, told["threads"])
            running.callback(worker.close)
            found[case.name] = {"begun": begun, "rounds": []} | (worker.answer() or {})
            found[case.name]["first"] = worker.answer()
            print(case.name, worker.failed or found[case.name]["first"], flush=True)
            workers.append(worker)
        for turn in range(rounds):
            first = turn % len(workers)
            for worker in [*workers[first:], *workers[:first]]:
                if not worker.failed and (round_ := worker.turn()):
                    found[worker.case.name]["rounds"].append(round_)
                    print(turn + 1, worker.case.name, f"{round_['seconds']:.1f} s", flush=True)
    for worker in workers:
        if worker.failed:
            found[worker.case.name] |= {"says": worker.failed}
    return found


def merged(told: dict[str, Any], found: dict[str, Any], file: Path) -> dict[str, Any]:
    """What was measured now, and of the other cases what was measured before in the same setting."""
    before = json.loads(file.read_text())["figures"] if file.exists() else {}
    kept = before.get("cases", {}) if before.get("setting") == told else {}
    if gone := before.get("cases", {}).keys() - kept.keys() - found.keys():
        print(f"measured in another setting, and no longer there: {'; '.join(sorted(gone))}")
    return {
        "setting": told,
        "cases": {case.name: (kept | found)[case.name] for case in CASES if case.name in kept | found},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", default=[])
    args = parser.parse_args()
    if unknown := set(args.only) - {case.tool for case in CASES} - {case.name for case in CASES}:
        parser.error(f"--only: no {' or '.join(sorted(unknown))} among {'; '.join(case.name for case in CASES)}")
    chosen = [case for case in CASES if not args.only or {case.tool, case.name} & set(args.only)]
    installed = [case for case in chosen if python(case.tool).exists()]
    for tool in sorted({case.tool for case in chosen} - {case.tool for case in installed}):
        print(f"{tool} is left out: it has no environment; make peers")
    if not installed:
        parser.error("none of these has an environment; make peers")
    with tempfile.TemporaryDirectory() as name:
        os.environ["MANTIS_LITE_CACHE"] = f"{name}/cache"
        told = setting(Path(name), args.rows, args.threads)
        found = measured(installed, Path(name), told, args.rounds)
    results.write("peers", merged(told, found, results.FOLDER / "peers.json"))
    table.write()


if __name__ == "__main__":
    main()
