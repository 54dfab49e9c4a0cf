"""How many pictures rows have, where that is clear without reading them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .schema import CONTENTS, TURNS


def plain_count(row: Mapping[str, Any]) -> int | None:
    """The pictures of a chat row whose turns are texts; None where only reading it would tell."""
    turns = next((row[key] for key in TURNS if row.get(key) is not None), None)
    if not isinstance(turns, list) or not turns or row.get("video") or row.get("videos"):
        return None
    for turn in turns:
        if not isinstance(turn, dict) or any(isinstance(turn.get(key), list) for key in CONTENTS):
            return None
    found = row.get("image") or row.get("images")
    return len(found) if isinstance(found, list) else int(found is not None)


def list_counts(dataset: Any) -> Callable[[], np.ndarray] | None:
    """As `plain_count` of all rows (N,) of a table in Arrow's format at once, by the lengths of its lists alone."""
    import pyarrow as pa

    schema = dataset.features.arrow_schema
    names = set(schema.names)
    turns = next((key for key in TURNS if key in names), None)
    if turns is None or names & {"image", "video", "videos"} or "images" not in names:
        return None
    kinds = schema.field("images").type, schema.field(turns).type
    if not all(pa.types.is_list(kind) or pa.types.is_large_list(kind) for kind in kinds):
        return None
    turn = kinds[1].value_type
    if not pa.types.is_struct(turn) or any(pa.types.is_nested(field.type) for field in turn):
        return None
    return partial(_lengths, dataset)


def _lengths(dataset: Any) -> np.ndarray:
    import pyarrow.compute as pc

    column = dataset.select_columns("images")[:]["images"]
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()
