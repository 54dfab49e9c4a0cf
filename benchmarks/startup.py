"""From a command to its first line: help, imports, `check` of 10,000 rows, and the second start of preparing them.

    python -m benchmarks.startup [--rows 10000]

Each is a process of its own, as the console script starts it; ways take turns. TRL's own command line runs in the same
environment. Seconds are those of the clock, and beside them those of the processors. The rows have as much text, at
four characters a token, and as many pictures as rows of the mixture of lengths, at even distances; the pictures, of
64 x 48, are 2,000 that rows share. The model is a small LLaVA whose tokenizer has learned the rows' words; Tiny Mantis'
makes a token of nearly each letter, and takes longer. Cold is with an empty cache, warm the same again; both must say
the same. The second start of preparing is timed within one process that has its imports behind it, with what the first
has remembered.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe_file import load_recipe

from . import planning, results, small_llava
from .preparation import learned, make_whole, run

WAYS = {
    "python": ["-c", "pass"],
    "import mantis_lite": ["-c", "import mantis_lite"],
    "mantis-lite --help": ["mantis-lite", "--help"],
    "trl --help": ["trl", "--help"],
    "mantis-lite train --help": ["mantis-lite", "train", "--help"],
}


def command(words: list[str]) -> list[str]:
    """Words as a process: Python's own, or a console script as its file starts it, installed or not."""
    if words[0].startswith("-"):
        return [sys.executable, *words]
    name, *rest = words
    (script,) = (script for script in entry_points(group="console_scripts") if script.name == name)
    code = f"import sys; from {script.module} import {script.attr}; sys.argv[0] = {name!r}; sys.exit({script.attr}())"
    return [sys.executable, "-c", code, *rest]


def finished(words: list[str], **env: str) -> str:
    """What the process prints; it must end well."""
    settings = os.environ | {"NO_COLOR": "1", "COLUMNS": "200"} | env
    done = subprocess.run(command(words), env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def processors() -> float:
    """Seconds that processors have spent on processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Processes:
    """A way that starts a process, and what processors spent on it each time."""

    def __init__(self, start: Callable[[], str]) -> None:
        self.start = start
        self.seconds: list[float] = []

    def __call__(self) -> str:
        before = processors()
        said = self.start()
        self.seconds.append(processors() - before)
        return said


def timed(ways: dict[str, Callable[[], str]], same: Any = None, warm: bool = True) -> dict[str, Any]:
    """Seconds of the clock and of processors, of ways in turn."""
    watched = {name: Processes(way) for name, way in ways.items()}
    clock = results.interleaved(watched, same=same, warm=warm)
    return {
        name: {
            "seconds": results.spread(clock[name]),
            "processor_seconds": results.spread(way.seconds[-len(clock[name]) :]),
        }
        for name, way in watched.items()
    }


def agree(found: list[str]) -> None:
    """Cold and warm say the same of the rows; warm also says that it was found before."""
    cold, warm, tiny = found
    assert "rows read" in tiny
    assert warm.startswith(cold) and "rows read" in cold and "As of" in warm[len(cold) :], (cold, warm)


def checked(rows: int) -> dict[str, Any]:
    """`check` cold and warm, and preparing again."""
    text, images = planning.read(planning.LENGTHS)
    some = np.linspace(0, len(text) - 1, rows).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        data = make_whole(Path(folder), text[some], images[some], shared=True)
        settings = [f"data={data}", f"model={learned(data)}", "packing.max_length=65536"]
        caches = iter(range(1_000))
        latest = ""

        def cold() -> str:
            nonlocal latest
            latest = f"{folder}/cache-{next(caches)}"
            return finished(["mantis-lite", "check", "chat", *settings], MANTIS_LITE_CACHE=latest)

        def tiny() -> str:
            words = ["mantis-lite", "check", "chat", *settings, "model=tiny"]
            return finished(words, MANTIS_LITE_CACHE=f"{folder}/cache-{next(caches)}")

        def warm() -> str:
            return finished(["mantis-lite", "check", "chat", *settings], MANTIS_LITE_CACHE=latest)

        ways = {"check, cold": cold, "check, warm": warm, "check, Tiny Mantis, cold": tiny}
        figures = timed(ways, agree, warm=False)
        os.environ["MANTIS_LITE_CACHE"] = latest
        recipe = load_recipe("chat", settings)
        encoder = open_checkpoint(recipe.model).encoder(recipe)
        again = results.interleaved({"again": lambda: run(recipe, encoder)})
        tokens = run(recipe, encoder).train.lengths[:, 0].sum() - images[some].sum() * small_llava.TOKENS
        return (
            {"rows": rows, "file_mb": round(data.stat().st_size / 1e6, 1), "tokens_a_row": round(float(tokens) / rows)}
            | figures
            | {"preparing again": {"seconds": results.spread(again["again"])}}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    args = parser.parse_args()
    figures = timed({name: lambda words=words: finished(words) for name, words in WAYS.items()})  # type: ignore[misc]
    for name, found in figures.items():
        print(name, found, flush=True)
    figures = {"commands": figures, "check": checked(args.rows)}
    print(figures["check"])
    results.write("startup", figures)


if __name__ == "__main__":
    main()
