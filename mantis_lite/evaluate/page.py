"""A comparison as one HTML file: its numbers, and the rows that flipped, with their pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Image as Picture

from ..pages import pieces, thumbnail, write_html
from .compare import Comparison, flipped
from .question import Result

MOST_BYTES = 8_000_000
"""Of text, and of pictures in base64; rows beyond are counted, and not shown."""
MOST_ROWS = 400
"""The same, of rows; half are for those that broke, half for those that were fixed."""


class Shown(NamedTuple):
    """A row that flipped: its prompt in pieces, each text or a picture's data: URI, and both answers."""

    pieces: list[tuple[str, str]]
    before: Result
    after: Result


def write_page(found: Comparison, pictures: Callable[[Result], list[Picture]], file: Path) -> None:
    """Write the page; no request leaves it, and what rows say cannot become part of it. Raises OSError, SampleError."""
    broken, left = _rows(found.broken, pictures, MOST_BYTES // 2)
    fixed, left_fixed = _rows(found.fixed, pictures, MOST_BYTES // 2)
    sections = [
        ("Broken, better in A", broken, len(found.broken), left),
        ("Fixed, better in B", fixed, len(found.fixed), left_fixed),
    ]
    write_html("evaluate/compare.html", file, found=found, flipped=flipped(found), sections=sections)


def _rows(
    pairs: Sequence[tuple[Result, Result]], pictures: Callable[[Result], list[Picture]], room: int
) -> tuple[list[Shown], int]:
    """As many rows as there is room for, and how many are left out."""
    shown: list[Shown] = []
    for before, after in pairs[: MOST_ROWS // 2]:
        links = [thumbnail(picture) for picture in pictures(before)]
        room -= sum(map(len, links)) + sum(map(len, (before.prompt, before.raw or "", after.raw or "")))
        if room < 0 and shown:
            break
        shown.append(Shown(pieces(before.prompt, links), before, after))
    return shown, len(pairs) - len(shown)
