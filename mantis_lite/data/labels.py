"""What is right of a row, in any spelling -> a target for its scores; and the names of the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from ..errors import DataError, SampleError
from ..recipe import Problem
from .sample import Sample

Values = dict[str, float]
"""The value of each label that a row names: a number, or whether it holds; a class is the one that does."""


@dataclass(frozen=True)
class Labels:
    """The labels of a head: their names, in the order of its scores."""

    problem: Problem
    names: tuple[str, ...]

    def target(self, values: Values, sample: Sample) -> np.ndarray:
        """Float32 (L,), or int64 () with the number of a row's class. Raises SampleError for other labels than these.

        A row that lists the labels which hold leaves out those that do not.
        """
        if self.problem == "regression" and not isinstance(sample.labels, Mapping):
            values = self._only(values, sample)
        if unknown := [name for name in values if name not in self.names]:
            found = f"the label {unknown[0]!r} is none of {', '.join(self.names)}"
            raise SampleError(sample.where, found, "Mend the row, or add it to head.labels.", sample.id)
        if self.problem == "single_label":
            return np.array(self.names.index(next(iter(values))), dtype=np.int64)
        listed = self.problem == "multi_label" and not isinstance(sample.labels, Mapping)
        missing = [name for name in self.names if name not in values]
        if missing and not listed:
            remedy = f"Each row gives a value for each of {', '.join(self.names)}."
            raise SampleError(sample.where, f"no value for the label {missing[0]!r}", remedy, sample.id)
        return np.array([values.get(name, 0.0) for name in self.names], dtype=np.float32)

    def _only(self, values: Values, sample: Sample) -> Values:
        """A number by itself belongs to the only label there is, whatever that is called."""
        if len(self.names) > 1:
            found = f"one number for {len(self.names)} labels"
            raise SampleError(sample.where, found, f"Give one by name for each of {', '.join(self.names)}.", sample.id)
        return dict.fromkeys(self.names, next(iter(values.values())))


def read_labels(sample: Sample, problem: Problem) -> Values:
    """The labels of one row, checked for the problem. Raises SampleError.

    "regression": a number, or numbers by name. "single_label": a class, or 1 for one name among zeros. "multi_label":
    a list of those that hold, or 0 and 1 by name.
    """
    raw = sample.labels
    if raw is None:
        remedy = 'Add "labels", or "label" where there is one.'
        raise SampleError(sample.where, "the row has no labels", remedy, sample.id)
    if isinstance(raw, Mapping):
        named = {str(name): _number(value, name, sample, problem) for name, value in raw.items() if value is not None}
        if not named:
            raise SampleError(sample.where, "the labels are empty", "Give a value for each.", sample.id)
        if problem == "regression":
            return named
        if odd := [name for name, value in named.items() if value not in (0, 1)]:
            found = f"the label {odd[0]!r} is {named[odd[0]]:g} where 0 or 1 is meant"
            raise SampleError(sample.where, found, "Set head.problem=regression for numbers.", sample.id)
        if problem == "multi_label":
            return named
        right = [name for name, value in named.items() if value]
        if len(right) != 1:
            found = f"{len(right)} of the row's classes hold, and it can be of one only"
            raise SampleError(sample.where, found, "Set head.problem=multi_label for several.", sample.id)
        return {right[0]: 1.0}
    if problem == "regression":
        return {"label": _number(raw, "label", sample, problem)}
    if problem == "single_label":
        return {_class(raw, sample): 1.0}
    if not isinstance(raw, list | tuple):
        found = f"the labels are {raw!r:.80}, not a list of those that hold"
        raise SampleError(sample.where, found, "Set head.problem=single_label for one class.", sample.id)
    return {_class(name, sample): 1.0 for name in raw}


def name_labels(problem: Problem, stated: Sequence[str] | None, rows: Sequence[Values]) -> Labels:
    """The labels that the recipe states, or all that the rows name.

    Numbers come in the order in which rows name them, as the original has those of its first row; classes and lists in
    the order of the alphabet, whatever row comes first. Raises DataError where there is nothing to tell apart.
    """
    found = list(dict.fromkeys(name for values in rows for name in values))
    if stated is None and problem != "regression":
        found.sort()
    names = tuple(stated or found)
    if problem == "single_label" and len(found) < 2:
        told = f"all {len(rows):,} rows are of the class {found[0]!r}" if found else "no row has a class"
        raise DataError(f"labels: {told}, so there is nothing to learn\n  Add rows of another class.")
    return Labels(problem, names)


def constant_labels(labels: Labels, targets: np.ndarray) -> list[str]:
    """The labels whose value is the same in every row. Raises DataError where no other is left to tell apart."""
    if labels.problem == "single_label":
        return []
    constant = [name for name, column in zip(labels.names, targets.T, strict=True) if len(np.unique(column)) == 1]
    if labels.problem == "multi_label" and len(constant) == len(labels.names):
        raise DataError(
            f"labels: each of {', '.join(constant)} is the same in all {len(targets):,} rows\n"
            "  Add rows with other labels."
        )
    return constant


def _number(value: Any, name: Any, sample: Sample, problem: Problem) -> float:
    if isinstance(value, bool) and problem != "regression":
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        remedy = "Give a number, or set head.problem=single_label for classes."
        raise SampleError(sample.where, f"the label {name!r} is {value!r:.80}, not a number", remedy, sample.id)
    if not isfinite(value):
        raise SampleError(sample.where, f"the label {name!r} is {value}", "Give a finite number.", sample.id)
    return float(value)


def _class(value: Any, sample: Sample) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value):
        return str(value)
    remedy = "Give a class's name, or set head.problem=regression for numbers."
    raise SampleError(sample.where, f"the label is {value!r:.80}, not a class", remedy, sample.id)
