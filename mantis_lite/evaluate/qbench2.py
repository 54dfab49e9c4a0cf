"""Q-Bench2, perception of pairs: what differs in how two pictures look (Zhang et al. 2024, arXiv:2402.07116)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .benchmark import Benchmark
from .mantis_rows import open_rows, parse, question_of, right
from .question import Protocol, Question

CONCERNS = ("distortion", "others", "compare", "joint")
UNUSED = "N/A"
"""The text of an option that a row does not have."""


def read(source: str, protocol: Protocol) -> list[Question]:
    """The pairs in the hub's columns, or as Mantis' own list of them. Raises SampleError, DataError."""
    rows = open_rows(source, "data", "dev")
    return [question_of(_row(rows.row(at), f"{Path(rows.name).stem}-{at}"), rows, at) for at in range(len(rows))]


def _row(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A row of the hub's columns as Mantis writes them; its own as it is."""
    if "correct_choice" not in row:
        return row
    options = [row.get(f"option{at}") for at in range(4)]
    return {
        "id": str(row["id"]) if row.get("id") is not None else name,
        "question_type": "multi-choice",
        "question": row.get("question"),
        "images": [row.get("image1"), row.get("image2")],
        "options": [
            f"({letter}) {o}" for letter, o in zip("ABCD", options, strict=True) if o not in (None, "", UNUSED)
        ],
        "answer": row["correct_choice"],
        "category": f"type {row['question_type']}" if row.get("question_type") is not None else "",
    }


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
