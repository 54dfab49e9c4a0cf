"""What a benchmark asks: a sample to be answered, what may be chosen, and what is right; and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from ..data.sample import Sample

Protocol = Literal["own", "upstream"]
"""How answers are asked for and read: as documented here, or as the original Mantis does, its mistakes included."""

Kind = Literal["choice", "short", "description"]


@dataclass(frozen=True)
class Question:
    """One row: the turns to be answered, the last of them the user's, and the right answer.

    `answer` is a letter where there are `options`, the texts that letters from A on stand for, without the letters.
    """

    id: str
    sample: Sample
    kind: Kind
    answer: str
    options: tuple[str, ...] = ()
    category: str = ""
    group: str = ""
    """Rows that some metric takes together, as the pairs of pictures of one statement."""

    @property
    def letters(self) -> str:
        return ascii_uppercase[: len(self.options)]


@dataclass(frozen=True)
class Result:
    """What a model said to a question, as a line of results has it.

    `parsed` is what was read from `raw`, or None where nothing could be; `logprobs`, by letter, are those of scoring
    by likelihood, in nats; `scores` are what a metric needs besides.
    """

    id: str
    category: str
    group: str
    prompt: str
    """The turns as text, with "<image>" and "<video>" where pictures and clips stand."""
    images: tuple[str, ...]
    """What each picture is: its file, and of a clip's the frame; for one inside a table its digest."""
    answer: str
    raw: str | None
    parsed: str | None
    correct: float
    """1 or 0, or a share between."""
    logprobs: dict[str, float] | None = None
    scores: dict[str, Any] | None = None
