"""Q-Bench2, perception of pairs: what differs in how two pictures look (Zhang et al. 2024, arXiv:2402.07116)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from .benchmark import Benchmark
from .mantis_rows import open_rows, parse, question_of, right
from .question import Protocol, Question

UNUSED = "N/A"
"""The text of an option that a row does not have, behind those that it has."""


def read(source: str, protocol: Protocol) -> list[Question]:
    """The pairs in the hub's columns, as lines beside their folder of pictures, or as Mantis' own list of them.

    Raises SampleError, DataError.
    """
    rows = open_rows(source, "data", "dev")
    return [question_of(_row(rows.row(at), f"{Path(rows.name).stem}-{at}"), rows, at) for at in range(len(rows))]


def _row(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A row of the hub's columns, or of its lines, as Mantis writes them; its own as it is."""
    if "img_path" in row:
        kind, options, images = row.get("type"), list(row.get("candidates") or ()), _pair(str(row["img_path"]))
    elif "correct_choice" in row:
        kind, options = row.get("question_type"), [row.get(f"option{at}") for at in range(4)]
        images = [row.get("image1"), row.get("image2")]
    else:
        return row
    while options and options[-1] in (None, "", UNUSED):
        options.pop()
    return {
        "id": str(row["id"]) if row.get("id") is not None else name,
        "question_type": "multi-choice",
        "question": row.get("question"),
        "images": images,
        "options": [f"({letter}) {text or UNUSED}" for letter, text in zip(ascii_uppercase, options, strict=False)],
        "answer": row.get("correct_choice") or "hidden",
        "category": f"type {kind}" if kind is not None else "",
    }


def _pair(path: str) -> list[Any]:
    """The two pictures of a line, which names them joined: `dev\\1.jpg_cat_2.jpg.jpg` is of 1.jpg and 2.jpg."""
    names = path.rpartition("\\")[2].removesuffix(".jpg").split("_cat_")
    return [f"all_single_images/{name}" for name in names]


QBENCH2 = Benchmark(
    name="qbench2",
    source="q-future/Q-Bench2-HF:default:dev",
    read=read,
    parse=parse,
    right=right,
    max_new_tokens=32,
    differences=(
        "a letter is read from what the answer says, and not from the first letter of its first word",
        "an answer in which none is found is wrong; other harnesses then draw one",
    ),
)
