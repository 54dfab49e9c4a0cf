"""Rows with labels: a score head's predictions as results that can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.labels import Labels
from ..errors import DiskError, RecipeError
from ..files import write_whole
from ..metrics import probabilities
from ..scoring import Predictions, predict
from .asking import named, shown
from .evaluation import Evaluation
from .question import Result
from .results import RESULTS, SUMMARY, line_of, summarise


def evaluate_labels(source: str, overrides: Sequence[str], folder: Path, from_scratch: bool = False) -> Evaluation:
    """Score the rows of `data=`, each of which has labels, in a folder of results with all metrics of the problem.

    A row is right where its class is, or all of its labels are; of numbers, where each is to the nearest whole one.
    Raises RecipeError, DataError, SampleError, FitError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"--to: {folder} cannot be made: {error.strerror}\n  Name another folder.") from error
    if (folder / SUMMARY).is_file() and not from_scratch:
        raise RecipeError(f"--to: {folder} has results already\n  Add --from-scratch, or name another folder.")
    found = predict(source, overrides, metrics=True, output=folder / "predictions.jsonl")
    results = _results(found)
    rows = ", ".join(rows.spec.path for rows in found.prepared.train.rows)
    data = found.recipe.data.model_dump(mode="json")
    summary: dict[str, Any] = {"model": source, "benchmark": "labels", "rows": rows, "protocol": "own"}
    summary |= {"data": data, "task": "classify", "rejects": list(map(str, found.prepared.rejects))}
    summary |= summarise(results, "rows") | {"more": found.metrics}
    write_whole(folder / SUMMARY, json.dumps(summary, indent=2).encode() + b"\n")
    write_whole(folder / RESULTS, (line_of(result).encode() for result in results))
    return Evaluation(folder, summary)


def _results(found: Predictions) -> list[Result]:
    samples, labels = found.prepared.train, found.labels
    assert samples.targets is not None
    results = []
    for number, at in enumerate(found.samples):
        sample = samples[at]
        answer, parsed = (
            _words(labels, values) for values in (samples.targets[at], _chosen(labels, found.logits[number]))
        )
        values = (
            found.logits[number] if labels.problem == "regression" else probabilities(labels, found.logits[[number]])[0]
        )
        scores = {name: round(float(value), 6) for name, value in zip(labels.names, values, strict=True)}
        pictures = tuple(map(named, sample.images))
        results.append(
            Result(
                sample.where,
                "",
                "",
                shown(sample),
                pictures,
                answer,
                None,
                parsed,
                float(answer == parsed),
                None,
                scores,
            )
        )
    return results


def _chosen(labels: Labels, logits: np.ndarray) -> np.ndarray:
    """What scores (L,) come to, as targets have it."""
    if labels.problem == "single_label":
        return np.array(logits.argmax())
    return logits if labels.problem == "regression" else (logits > 0).astype(np.float32)


def _words(labels: Labels, target: np.ndarray) -> str:
    if labels.problem == "single_label":
        return labels.names[int(target)]
    if labels.problem == "regression":
        return ", ".join(f"{name} {round(float(value))}" for name, value in zip(labels.names, target, strict=True))
    return ", ".join(name for name, value in zip(labels.names, target, strict=True) if value) or "none"
