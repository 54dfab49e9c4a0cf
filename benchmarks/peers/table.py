"""The table of results/peers.json in this folder's README.md; `python -m benchmarks.peers.table` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from .. import results
from .cases import CASES, NAMES, PACKAGES, SINGLE, Case

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- measured -->", "<!-- end -->"
SAME = 1e-5
"""By how much of it a loss may be off and count as the same: float32, in another order."""
REFERENCE, PACKS = f"ours, {SINGLE}", "ours, packed"


def lines(measured: dict[str, Any]) -> Iterator[str]:
    """What it was measured on, and a row a case; of one that did not train, what the tool said."""
    figures = measured["figures"]
    setting, cases = figures["setting"], figures["cases"]
    machine = f"{measured['device']}, {setting['threads']} threads, torch {measured['versions']['torch']}"
    tokens = f"{setting['tokens']:,} tokens, {setting['label_tokens']:,} of them in answers"
    rows = f"{setting['rows']} of {setting['from']} with {setting['pictures']} pictures, {tokens}"
    whole = [case for case in cases.values() if "says" not in case]
    trained = _each(f"{case['first']['trained']:,} parameters train" for case in whole)
    rounds = _each(f"{len(case['rounds'])} rounds" for case in whole)
    yield f"{measured['date']}, {machine}: {rows}; {trained}. Median (lowest-highest) of {rounds}."
    yield ""
    yield (
        "| tool | rows go in as | samples a second | times the time of our packs | label tokens a second "
        "| inputs made, samples a second | padding | peak above start, MB | tokens with loss | loss |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for case in CASES:
        if case.name in cases:
            yield _row(case, cases[case.name], figures)


def summary(case: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """What the rounds of a case come to: rates as (median, lowest, highest), shares, MB, and its loss."""
    first, rounds = case["first"], case["rounds"]
    rows, labels = setting["rows"], first["labels"]
    return {
        "samples": _spread([rows / each["seconds"] for each in rounds]),
        "label_tokens": _spread([labels / each["seconds"] for each in rounds]),
        "inputs": _spread([rows / each["preparing_seconds"] for each in rounds]),
        "padding": 1 - setting["tokens"] / first["tokens"],
        "peak_mb": max(each["peak_mb"] for each in [first, *rounds]),
        "with_loss": labels / setting["tokens"],
        "loss": first["loss"],
    }


def agreement(case: dict[str, Any], figures: dict[str, Any]) -> str:
    """Whether the loss is over the same tokens as this package's, and the same."""
    first, reference = case["first"], figures["cases"].get(REFERENCE, {}).get("first")
    if first["labels"] != figures["setting"]["label_tokens"]:
        return "of other tokens"
    if reference is None:
        return "not compared"
    off = abs(first["loss"] / reference["loss"] - 1)
    return "the same" if off <= SAME else f"off by {off:.1%}"


def against_packs(case: dict[str, Any], figures: dict[str, Any]) -> str:
    """How many times as long as this package's packs it takes, turn by turn, where both took turns."""
    packs = figures["cases"].get(PACKS, {})
    if "says" in packs or case["begun"] != packs.get("begun"):
        return "not compared"
    seconds, ours = ([each["seconds"] for each in of["rounds"]] for of in (case, packs))
    return _rate(_spread(results.quotients(seconds, ours)))


def _spread(values: list[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def _each(values: Iterable[str]) -> str:
    """What is said of all cases, once where it is the same."""
    return " or ".join(sorted(set(values)))


def _row(case: Case, found: dict[str, Any], figures: dict[str, Any]) -> str:
    tool = f"{NAMES[case.tool]} {found.get('versions', {}).get(PACKAGES[case.tool], '')}".strip()
    if "says" in found:
        words = found["says"].partition(": ")[2] or found["says"]
        return f'| {tool} | {case.words} | does not train: "{words}" | | | | | | | |'
    what = summary(found, figures["setting"])
    cells = [_rate(what["samples"]), against_packs(found, figures), _rate(what["label_tokens"]), _rate(what["inputs"])]
    cells += [f"{what['padding']:.1%}", f"{what['peak_mb']:,.0f}", f"{what['with_loss']:.1%}"]
    return " | ".join([f"| {tool}", case.words, *cells, f"{what['loss']:.4f}, {agreement(found, figures)} |"])


def _rate(spread: tuple[float, float, float]) -> str:
    digits = 0 if spread[0] >= 100 else 1 if spread[0] >= 10 else 2
    middle, low, high = (f"{value:,.{digits}f}" for value in spread)
    return f"{middle} ({low}-{high})"


def write() -> None:
    """Put the table of what was measured last into the README."""
    text = README.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    measured = json.loads((results.FOLDER / "peers.json").read_text())
    README.write_text("\n".join([before + BEGIN, "", *lines(measured), "", END + after]))


if __name__ == "__main__":
    write()
