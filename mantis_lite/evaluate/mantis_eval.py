"""Mantis-Eval: 217 questions about several pictures, some with options (Jiang et al. 2024, arXiv:2405.01483)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .benchmark import Benchmark, Metrics
from .mantis_rows import parse, read_rows, right
from .question import Protocol, Question, Result


def kind_of_row(raw: str | None, question: Question, protocol: Protocol) -> dict[str, Any]:
    return {"question_type": "multi-choice" if question.kind == "choice" else "short-answer"}


def by_kind(results: Sequence[Result]) -> Metrics:
    """The accuracy of each kind of question."""
    of: defaultdict[str, list[float]] = defaultdict(list)
    for result in results:
        assert result.scores is not None
        of[result.scores["question_type"]].append(result.correct)
    return {kind: sum(shares) / len(shares) for kind, shares in sorted(of.items())}


MANTIS_EVAL = Benchmark(
    name="mantis-eval",
    source="TIGER-Lab/Mantis-Eval:mantis_eval:test",
    read=lambda source, protocol: read_rows(source, "mantis_eval", "test"),
    parse=parse,
    right=right,
    scores=kind_of_row,
    more=by_kind,
    max_new_tokens=512,
    differences=(
        "a letter is read from what the answer says, and not from the first letter of its first word",
        "of an answer in words, what stands behind the last 'Final Answer:' counts, without a full stop",
        "answers have 512 tokens at most; the original's LLaVA-style wrapper allows 4,096",
    ),
)
