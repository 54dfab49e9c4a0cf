"""One training example, as the rest of the package knows it: turns of text, pictures and clips, not yet opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .zipped import Zipped

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Image:
    """A picture, not yet opened: a file's path, the bytes of a file, or a file within a .zip."""

    source: Path | bytes | Zipped


@dataclass(frozen=True, slots=True)
class Frame(Image):
    """A picture of a clip: its `source` is the clip's file, `at` the time in s or, where an int, the frame's number.

    `size` is its (width, height) in pixels, by the clip's header.
    """

    at: float | int
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Video:
    """A clip, not yet opened: a file, a folder of frames, or its frames as pictures.

    `start` and `end` are in s; only a file has times.
    """

    source: Path | tuple[Image, ...]
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says: text, pictures and clips, in the order the model reads them."""

    role: Role
    content: tuple[str | Image | Video, ...]

    @property
    def shown(self) -> str:
        """Its text, with "<image>" and "<video>" where pictures and clips stand."""
        marks = {True: "<video>", False: "<image>"}
        return "".join(part if isinstance(part, str) else marks[isinstance(part, Video)] for part in self.content)


class Written(NamedTuple):
    """What an encoder has written a sample out as: ids (T,), labels (T,), and for each picture its first token and the
    one behind its last (P, 2), all int32; `by` is the encoder's fingerprint."""

    ids: np.ndarray
    labels: np.ndarray
    spans: np.ndarray
    by: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example; `where` is "train.jsonl:12"; `notices` says what was dropped from the row.

    `labels` are the row's own, as written, where the task reads any. `written` is there of a row that a shard keeps.
    """

    where: str
    id: str | None
    turns: tuple[Turn, ...]
    notices: tuple[str, ...] = ()
    labels: Any = None
    written: Written | None = field(default=None, compare=False)

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple([part for turn in self.turns for part in turn.content if isinstance(part, Image)])

    @property
    def videos(self) -> tuple[Video, ...]:
        return tuple([part for turn in self.turns for part in turn.content if isinstance(part, Video)])
