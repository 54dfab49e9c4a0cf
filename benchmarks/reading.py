"""2 GB of JSON Lines, indexed and prepared: the most memory that takes, and the time.

    python -m benchmarks.reading

Distinct rows of seeded text of about 2 KB each. The reading runs in a process of its own, whose memory is what it held
at the most, with the libraries it has loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from . import results

TEXT = 500
"""Characters of a turn."""
LIMIT = 1 << 30
"""Bytes that reading may hold."""


def write_rows(path: Path, size: int) -> int:
    """Write rows until the file has this size; returns how many."""
    random = np.random.default_rng(0)
    words = np.array(["".join(random.choice(list("abcdefghijklmnoprstuvw"), n)) for n in random.integers(2, 9, 5000)])
    text = " ".join(random.choice(words, 1_000_000))
    count = written = 0
    with path.open("w") as file:
        while written < size:
            texts = [text[at : at + TEXT] for at in random.integers(0, len(text) - TEXT, 4).tolist()]
            turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
            written += file.write(json.dumps({"id": str(count), "messages": turns}) + "\n")
            count += 1
    return count


def read(path: str, model: str) -> None:
    """Prepare the rows as `train` and `check` do, and print what that took."""
    from mantis_lite.data.prepare import prepare
    from mantis_lite.models.checkpoint import open_checkpoint
    from mantis_lite.recipe_file import load_recipe

    recipe = load_recipe("chat", [f"data={path}", f"model={model}"])
    encoder = open_checkpoint(recipe.model).encoder(recipe)
    held = peak()
    begun = time.perf_counter()
    prepared = prepare(recipe.data, recipe.packing, encoder)
    seconds = time.perf_counter() - begun
    figures = {"rows": len(prepared.train), "seconds": seconds, "peak": peak(), "libraries": held}
    print(json.dumps(figures))


def peak() -> int:
    """Bytes of memory that this process has held at the most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(size: int, model: str) -> dict[str, float]:
    """Write a file of `size` bytes and read it in another process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        count = write_rows(path, size)
        command = [sys.executable, "-m", "benchmarks.reading", "--read", str(path), "--model", model]
        env = os.environ | {"MANTIS_LITE_CACHE": f"{folder}/cache"}
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        assert figures["rows"] == count
        return {
            "file_gb": round(path.stat().st_size / 1e9, 2),
            "rows": count,
            "seconds": round(figures["seconds"]),
            "peak_mib": figures["peak"] >> 20,
            "of_which_libraries_mib": figures["libraries"] >> 20,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=2.0, help="GB of the file")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--read", help="only read this file, and print what it took")
    args = parser.parse_args()
    if args.read:
        read(args.read, args.model)
        return
    figures = measure(int(args.size * 1e9), args.model)
    print(figures)
    results.write("reading", figures)
    assert figures["peak_mib"] < LIMIT >> 20


if __name__ == "__main__":
    main()
