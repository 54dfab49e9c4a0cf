"""The table in docs/measured.md of benchmarks/results/gpu.json: `python -m benchmarks.gpu_table` prints it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from . import results

WORDS = {
    "G1": "LLaVA, text alone",
    "G2": "LLaVA, text alone",
    "G3": "LLaVA, text alone",
    "G4": "LLaVA, text alone",
    "G5": "LLaVA, rows with pictures",
    "G6": "Idefics2, rows with pictures",
    "G7": "peaks",
}


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """A row a case that trained: peak, what `mantis-lite fit` says of it, and speed where that was looked at."""
    yield "| what | case | peak GiB | `fit` says | tokens a second |"
    yield "|---|---|---|---|---|"
    for group, words in WORDS.items():
        for case, found in figures.get(group, {}).items():
            name = case.replace("the usual way", "transformers + PEFT + bitsandbytes")
            if "peak_gib" in found:
                yield _row(words, name, found, f"{found['tokens_per_second']:,}")
            for length, each in found.get("by_length", {}).items():
                yield _row(words, f"{name}, a row of {int(length):,}", each, "")


def _row(words: str, case: str, found: dict[str, Any], speed: str) -> str:
    said = f"{found['estimated_gib']:.1f}" if "estimated_gib" in found else ""
    return f"| {words} | {case} | {found['peak_gib']:.1f} | {said} | {speed} |"


def main() -> None:
    print("\n".join(lines(json.loads((results.FOLDER / "gpu.json").read_text())["figures"])))


if __name__ == "__main__":
    main()
