"""What differs between two dicts of dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Change(NamedTuple):
    """A key, as "train.learning_rate", and both values; None where one has no such key."""

    key: str
    before: Any
    now: Any


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """The keys whose values differ, in order.

    >>> list(changes({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3, "d": 4}}))
    [Change(key='b.c', before=2, now=3), Change(key='b.d', before=None, now=4)]
    """
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from changes(one, other, f"{prefix}{key}.")
        elif one != other:
            yield Change(prefix + key, one, other)
