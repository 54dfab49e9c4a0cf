"""Lines of results, and what they come to: shares with the intervals they are known to."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from ..errors import DataError, RecipeError
from .question import Result

RESULTS, SUMMARY = "results.jsonl", "summary.json"
AGAIN = "\n  Evaluate again, with --from-scratch."


def line_of(result: Result) -> str:
    """A result as a line of its file."""
    return json.dumps(asdict(result), ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def read_results(folder: Path) -> tuple[list[Result], dict[str, Any]]:
    """The results in a folder, and their summary. Raises RecipeError for none, DataError for broken ones."""
    file, summary = folder / RESULTS, folder / SUMMARY
    if not (file.is_file() and summary.is_file()):
        remedy = "Run `mantis-lite evaluate` to its end, and name the folder it tells."
        raise RecipeError(f"{folder}: no folder of results\n  {remedy}")
    results: dict[str, Result] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            result = Result(**json.loads(line))
            if result.id in results:
                raise ValueError(f"the id {result.id} is of a line before")
            results[result.id] = replace(result, images=tuple(result.images))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}:{number}: no result: {error}{AGAIN}") from None
    try:
        return list(results.values()), json.loads(summary.read_bytes())
    except ValueError as error:
        raise DataError(f"{summary}: no summary: {error}{AGAIN}") from None


def summarise(results: Sequence[Result], overall: str) -> dict[str, Any]:
    """How many are right, in all and by category, each with an interval; and how many answers could not be read.

    `accuracy` is over rows, or with overall="categories" the mean over categories. Where choices were weighed,
    `likelihood` is the same of the likeliest letters.
    """
    summary: dict[str, Any] = {
        "count": len(results),
        "overall": overall,
        **_accuracies(results, correct, overall),
    }
    summary["unread"] = sum(result.parsed is None for result in results)
    weighed = [result for result in results if result.logprobs]
    if weighed:
        summary["likelihood"] = {"count": len(weighed)} | _accuracies(weighed, likely, overall)
    return summary


def interval(shares: np.ndarray) -> tuple[float, float]:
    """The 95% interval of a mean of shares (N,): Wilson's of what is 0 or 1 (1927), else the normal one.

    Of a single share in between nothing is known but that it is one.

    >>> [round(float(bound), 4) for bound in interval(np.array([1.0] * 8 + [0.0] * 2))]
    [0.4902, 0.9433]
    """
    if np.isin(shares, (0, 1)).all():
        found = binomtest(int(shares.sum()), len(shares)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    if len(shares) == 1:
        return 0.0, 1.0
    mean = float(shares.mean())
    reach = float(norm.ppf(0.975) * shares.std(ddof=1) / np.sqrt(len(shares)))
    return max(0.0, mean - reach), min(1.0, mean + reach)


def _accuracies(results: Sequence[Result], share: Callable[[Result], float], overall: str) -> dict[str, Any]:
    shares = np.array([share(result) for result in results], dtype=float)
    of: defaultdict[str, list[float]] = defaultdict(list)
    for result, value in zip(results, shares.tolist(), strict=True):
        of[result.category].append(value)
    parts = {category: np.array(of[category]) for category in sorted(of)}
    if overall == "categories":
        accuracy, bounds = float(np.mean([part.mean() for part in parts.values()])), of_means(list(parts.values()))
    else:
        accuracy, bounds = float(shares.mean()), interval(shares)
    found: dict[str, Any] = {"accuracy": accuracy, "interval": list(bounds)}
    if len(parts) > 1:
        found["categories"] = {
            category: {"count": len(part), "accuracy": float(part.mean()), "interval": list(interval(part))}
            for category, part in parts.items()
        }
    return found


def of_means(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    """The interval of the mean of means, from each one's own, which is no point where all are right.

    Variances are recovered from the intervals (Zou, Huang and Zhang 2009, for proportions).
    """
    means = np.array([part.mean() for part in parts])
    low, high = np.array([interval(part) for part in parts]).T
    down, up = (float(np.sqrt(((means - bound) ** 2).sum())) / len(parts) for bound in (low, high))
    return float(means.mean()) - down, float(means.mean()) + up


def correct(result: Result) -> float:
    """What an answer is worth."""
    return result.correct


def likely(result: Result) -> float:
    """Whether the likeliest letter is the right one."""
    return float(likeliest(result.logprobs) == result.answer)


def likeliest(logprobs: dict[str, float] | None) -> str | None:
    """The letter with the highest log-probability, the first of several."""
    return max(logprobs, key=lambda letter: logprobs[letter]) if logprobs else None
