"""Two models' answers to the same questions, side by side: is the one better, by how much, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from ..errors import RecipeError
from .question import Result
from .results import correct, likely, read_results

RESAMPLES, SEED = 10_000, 0
SAME = ("benchmark", "protocol")
"""What of two summaries has to be the same."""
TOLD = ("scoring", "max_new_tokens", "in_4_bits", "precision", "template", "system")
"""What may differ, and is told."""


@dataclass(frozen=True)
class Difference:
    """How much higher one mean is than another over the same rows, with the paired bootstrap's 95% interval.

    `p` is of McNemar's exact test (1947) on rows that are right in one alone; None where rows are right in part.
    """

    a: float
    b: float
    low: float
    high: float
    p: float | None

    @property
    def gain(self) -> float:
        return self.b - self.a

    @property
    def verdict(self) -> str:
        """What the interval says, in words; of rows so few that all that are drawn are alike, the test has a say."""
        if self.low <= 0 <= self.high or (self.p is not None and self.p >= 0.05):
            return "no difference that these rows could show"
        return "B is better" if self.low > 0 else "B is worse"


@dataclass(frozen=True)
class Comparison:
    """Rows that both have, and what became of them from A to B; `alone` counts those that only one has.

    `otherwise` is what differs in how they were asked: by its name in summaries, of A and of B.
    """

    name: str
    sources: tuple[str, str]
    summary: dict[str, Any]
    count: int
    alone: tuple[int, int]
    otherwise: dict[str, tuple[Any, Any]]
    accuracy: Difference
    likelihood: Difference | None
    categories: dict[str, Difference]
    broken: list[tuple[Result, Result]]
    fixed: list[tuple[Result, Result]]


def compare(a: Path, b: Path, resamples: int = RESAMPLES, seed: int = SEED) -> Comparison:
    """Compare the results in two folders, row by row.

    Raises RecipeError where they are not of the same questions, DataError for broken ones.
    """
    (before, summary), (after, other) = read_results(a), read_results(b)
    for key in SAME:
        if summary.get(key) != other.get(key):
            found = f"{a} is of {key} {summary.get(key)}, and {b} of {other.get(key)}"
            raise RecipeError(f"compare: {found}\n  Compare answers to the same questions.")
    now = {result.id: result for result in after}
    pairs = [(result, now[result.id]) for result in before if result.id in now]
    if not pairs:
        raise RecipeError(f"compare: no row is in both {a} and {b}\n  Compare answers to the same questions.")
    upstream = summary["protocol"] == "upstream"  # which prompts each family in its own way
    if odd := [one.id for one, two in pairs if _asked(one, not upstream) != _asked(two, not upstream)]:
        found = f"{len(odd)} rows have another question or right answer in {b}, the first of them {odd[0]}"
        raise RecipeError(f"compare: {found}\n  Evaluate both by the same rows.")
    weighed = [(one, two) for one, two in pairs if one.logprobs and two.logprobs]
    overall = summary["overall"]
    rng = np.random.default_rng(seed)
    return Comparison(
        name=summary["benchmark"],
        sources=(summary["model"], other["model"]),
        summary=summary,
        count=len(pairs),
        alone=(len(before) - len(pairs), len(after) - len(pairs)),
        otherwise={key: (summary.get(key), other.get(key)) for key in TOLD if summary.get(key) != other.get(key)},
        accuracy=_difference(pairs, correct, overall, resamples, rng),
        likelihood=_difference(weighed, likely, overall, resamples, rng) if weighed else None,
        categories={
            category: _difference(
                [pair for pair in pairs if pair[0].category == category], correct, "rows", resamples, rng
            )
            for category in _several(pairs)
        },
        broken=[pair for pair in pairs if pair[1].correct < pair[0].correct],
        fixed=[pair for pair in pairs if pair[1].correct > pair[0].correct],
    )


def flipped(found: Comparison) -> dict[str, tuple[int, int]]:
    """By category, how many rows broke and how many were fixed."""
    broken, fixed = (Counter(one.category for one, _ in pairs) for pairs in (found.broken, found.fixed))
    return {category: (broken[category], fixed[category]) for category in sorted({*broken, *fixed})}


def _asked(result: Result, prompt: bool) -> tuple[str, ...]:
    return result.answer, result.category, result.prompt if prompt else ""


def _several(pairs: Sequence[tuple[Result, Result]]) -> list[str]:
    categories = sorted({one.category for one, _ in pairs})
    return categories if len(categories) > 1 else []


def _difference(
    pairs: Sequence[tuple[Result, Result]], share: Any, overall: str, resamples: int, rng: np.random.Generator
) -> Difference:
    """Rows are drawn with both their answers; where categories count alike, within each of them (Efron 1979)."""
    shares = np.array([[share(one), share(two)] for one, two in pairs])
    categories = np.array([one.category if overall == "categories" else "" for one, _ in pairs])
    parts = [shares[categories == category] for category in np.unique(categories)]
    a, b = np.mean([part.mean(0) for part in parts], axis=0)
    drawn = np.mean([_drawn(part[:, 1] - part[:, 0], resamples, rng) for part in parts], axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    lost, won = int((shares[:, 0] > shares[:, 1]).sum()), int((shares[:, 0] < shares[:, 1]).sum())
    whole = bool(np.isin(shares, (0, 1)).all())
    p = (binomtest(won, won + lost).pvalue if won + lost else 1.0) if whole else None
    return Difference(float(a), float(b), float(low), float(high), None if p is None else float(p))


def _drawn(differences: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means (R,) of differences (N,) drawn again and again: of each value, how often it comes, is multinomial."""
    values, counts = np.unique(differences, return_counts=True)
    return rng.multinomial(len(differences), counts / len(differences), resamples) @ values / len(differences)
