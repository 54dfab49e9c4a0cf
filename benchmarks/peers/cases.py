"""What is measured: each tool padded, one row at a time, and packed where it says it can."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A tool by the name of its environment, what it does with rows in words, and its settings that say so."""

    tool: str
    words: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.words}"


NAMES = {"ours": "mantis_lite", "trl": "TRL", "llamafactory": "LLaMA-Factory", "swift": "ms-swift"}
PACKAGES = {"ours": "mantis-lite", "trl": "trl", "llamafactory": "llamafactory", "swift": "ms-swift"}
PADDED, SINGLE = "4 rows, padded", "1 row"

CASES = (
    Case("ours", "packed", {"packing": True}),
    Case("ours", SINGLE, {"packing": False}),
    Case("trl", PADDED, {"batch": 4, "answers": True}),
    Case("trl", SINGLE, {"batch": 1, "answers": True}),
    Case("trl", "1 row, its default labels", {"batch": 1, "answers": False}),
    Case("trl", "packing", {"batch": 1, "answers": True, "packing": True}),
    Case("llamafactory", PADDED, {"batch": 4}),
    Case("llamafactory", SINGLE, {"batch": 1}),
    Case("llamafactory", "neat_packing", {"batch": 1, "packing": True, "neat_packing": True}),
    Case("llamafactory", "packing", {"batch": 1, "packing": True}),
    Case("swift", PADDED, {"batch": 4}),
    Case("swift", SINGLE, {"batch": 1}),
    Case("swift", "packing", {"batch": 1, "packing": True}),
)
