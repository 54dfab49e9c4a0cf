"""What is right of a row, in any spelling -> a target for its scores; and the names of the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, SampleError
from ..recipe import Problem
from .sample import Sample

SHOWN = 10
"""How many labels a message names."""


class RowLabels(NamedTuple):
    """The labels of one row: a value by name, a class being the name of value 1; and whether the row named them all.

    A number by itself is not named, and a list of labels that hold leaves the others out.
    """

    values: dict[str, float]
    named: bool
    where: str
    id: str | None


@dataclass(frozen=True)
class Labels:
    """The labels of a head: their names, in the order of its scores."""

    problem: Problem
    names: tuple[str, ...]

    @cached_property
    def place(self) -> dict[str, int]:
        return {name: at for at, name in enumerate(self.names)}

    def target(self, row: RowLabels, named_by: Mapping[str, str] | None = None) -> np.ndarray:
        """Float32 (L,), or int64 () with the number of a row's class. Raises SampleError for other labels than these.

        `named_by` says, for each label that no recipe states, which row was the first to name it.
        """
        values = row.values
        if self.problem == "regression" and not row.named:
            values = self._only(row)
        if unknown := [name for name in values if name not in self.place]:
            found = f"the label {unknown[0]!r} is none of {some(self.names)}"
            raise SampleError(row.where, found, "Mend the row, or add it to head.labels.", row.id)
        if self.problem == "single_label":
            return np.array(self.place[next(iter(values))], dtype=np.int64)
        if row.named and (missing := [name for name in self.names if name not in values]):
            first = (named_by or {}).get(missing[0])
            found = f"no value for the label {missing[0]!r}" + (f", which {first} has" if first else "")
            remedy = f"Each row gives a value for each of {some(self.names)}."
            raise SampleError(row.where, found, remedy, row.id)
        return np.array([values.get(name, 0.0) for name in self.names], dtype=np.float32)

    def _only(self, row: RowLabels) -> dict[str, float]:
        """A number by itself belongs to the only label there is, whatever that is called."""
        if len(self.names) > 1:
            found = f"one number for {len(self.names)} labels"
            raise SampleError(row.where, found, f"Give one by name for each of {some(self.names)}.", row.id)
        return dict.fromkeys(self.names, next(iter(row.values.values())))


def some(names: Sequence[str]) -> str:
    """Names as a list for a message, the first few of many."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def read_labels(sample: Sample, problem: Problem) -> RowLabels:
    """The labels of one row, checked for the problem. Raises SampleError.

    "regression": a number, or numbers by name. "single_label": a class, or 1 for one name among zeros. "multi_label":
    a list of those that hold, or 0 and 1 by name.
    """
    try:
        values = _values(sample.labels, problem)
        for name in values:
            _refuse_half_characters(name)
    except _Fault as fault:
        found, remedy = fault.args
        raise SampleError(sample.where, found, remedy, sample.id) from None
    return RowLabels(values, isinstance(sample.labels, Mapping), sample.where, sample.id)


def name_labels(problem: Problem, stated: Sequence[str] | None, rows: Sequence[RowLabels]) -> Labels:
    """The labels that the recipe states, or all that the rows name.

    Numbers come in the order in which rows name them, as the original has those of its first row; classes and lists
    sorted, whatever row comes first. Raises DataError where there is no class.
    """
    found = list(dict.fromkeys(name for row in rows for name in row.values))
    if problem != "regression":
        found.sort(key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
    if not (stated or found):
        raise DataError("labels: no row has a label that holds\n  Add rows with labels.")
    return Labels(problem, tuple(stated or found))


def first_named(rows: Sequence[RowLabels]) -> dict[str, str]:
    """Which row was the first to name each label."""
    first: dict[str, str] = {}
    for row in rows:
        for name in row.values:
            first.setdefault(name, row.where)
    return first


def label_notices(labels: Labels, targets: np.ndarray) -> Iterator[str]:
    """What there is not to be learned from the targets (S, L) or (S,) of the rows to train on.

    Raises DataError where there is nothing to tell apart.
    """
    if labels.problem == "single_label":
        found = np.bincount(targets, minlength=len(labels.names))
        if (found > 0).sum() < 2:
            told = f"all {len(targets):,} rows to train on are of the class {labels.names[int(found.argmax())]!r}"
            raise DataError(f"labels: {told}, so there is nothing to learn\n  Add rows of another class.")
        absent = [name for name, count in zip(labels.names, found, strict=True) if not count]
        if absent:
            yield f"no row to train on is of the class {some(absent)}"
        return
    constant = [name for name, column in zip(labels.names, targets.T, strict=True) if np.ptp(column) == 0]
    if labels.problem == "multi_label" and len(constant) == len(labels.names):
        found_labels = f"each of {some(constant)} is the same in all {len(targets):,} rows"
        raise DataError(f"labels: {found_labels}\n  Add rows with other labels.")
    for name in constant:
        yield f"the label {name!r} has the same value in every row to train on"


class _Fault(Exception):
    """What is wrong with a row's labels and what to do; `read_labels` adds which row."""


def _values(raw: Any, problem: Problem) -> dict[str, float]:
    if raw is None:
        raise _Fault("the row has no labels", 'Add "labels", or "label" where there is one.')
    if isinstance(raw, Mapping):
        return _by_name(raw, problem)
    if problem == "regression":
        return {"label": _number(raw, "label", problem)}
    if problem == "single_label":
        return {_class(raw): 1.0}
    if not isinstance(raw, list | tuple):
        found = f"the labels are {raw!r:.80}, not a list of those that hold"
        raise _Fault(found, "Set head.problem=single_label for one class.")
    return {_class(name): 1.0 for name in raw}


def _by_name(raw: Mapping[Any, Any], problem: Problem) -> dict[str, float]:
    named = {str(name): _number(value, name, problem) for name, value in raw.items() if value is not None}
    if not named:
        raise _Fault("the labels are empty", "Give a value for each.")
    if problem == "regression":
        return named
    if odd := [name for name, value in named.items() if value not in (0, 1)]:
        found = f"the label {odd[0]!r} is {named[odd[0]]:g} where 0 or 1 is meant"
        raise _Fault(found, "Set head.problem=regression for numbers.")
    if problem == "multi_label":
        return named
    right = [name for name, value in named.items() if value]
    if len(right) != 1:
        found = f"{len(right)} of the row's classes hold, and it can be of one only"
        raise _Fault(found, "Set head.problem=multi_label for several.")
    return {right[0]: 1.0}


def _number(value: Any, name: Any, problem: Problem) -> float:
    if isinstance(value, bool) and problem != "regression":
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        remedy = "Give a number, or set head.problem=single_label for classes."
        raise _Fault(f"the label {name!r} is {value!r:.80}, not a number", remedy)
    if not isfinite(value) or abs(value) > np.finfo(np.float32).max:
        raise _Fault(f"the label {name!r} is {value:g}", "Give a finite number, of at most 3.4e38.")
    return float(value)


def _class(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value):
        return str(value)
    remedy = "Give a class's name, or set head.problem=regression for numbers."
    raise _Fault(f"the label is {value!r:.80}, not a class", remedy)


def _refuse_half_characters(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _Fault(f"the label {name!a} has half a character", "Write its other half behind it.") from None
