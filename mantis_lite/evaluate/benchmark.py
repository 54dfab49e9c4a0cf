"""A benchmark: where its rows are, how each becomes a question, how answers are read and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .question import Protocol, Question, Result

Metrics = dict[str, float]


def no_more(results: Sequence[Result]) -> Metrics:
    return {}


def no_scores(raw: str | None, question: Question, protocol: Protocol) -> dict[str, Any] | None:
    return None


@dataclass(frozen=True)
class Benchmark:
    """One file of the package each.

    `source` is where its rows are on the hub, as user/name:config:split; `read` takes that, or a local file or folder
    in the benchmark's own layout, and raises DataError and SampleError. `parse` reads an answer, None where nothing in
    it is one; `right` says what that is worth, from 0 to 1, and `scores` what is kept of a row besides. `more` are
    metrics besides accuracy and those of each category; `overall` is how categories are taken together: "rows", each
    the same, or "categories".
    """

    name: str
    source: str
    read: Callable[[str, Protocol], list[Question]]
    parse: Callable[[str, Question, Protocol], str | None]
    right: Callable[[str | None, Question, Protocol], float]
    scores: Callable[[str | None, Question, Protocol], dict[str, Any] | None] = no_scores
    more: Callable[[Sequence[Result]], Metrics] = no_more
    overall: str = "rows"
    max_new_tokens: int = 64
    upstream_new_tokens: int = 512
    differences: tuple[str, ...] = ()
    """What the protocol "own" does otherwise than the original, in words."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What a summary says of it besides."""
