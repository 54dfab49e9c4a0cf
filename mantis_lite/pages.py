"""One self-contained HTML file of a template of the package's, and pictures small enough to be in it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL.Image import Image as Picture

from .files import write_whole

SIDE = 256
"""Pixels of a picture's longer side."""
MARK = "<image>"


def write_html(template: str, file: Path, **found: Any) -> None:
    """Write what a template makes of what was found. Raises OSError."""
    write_whole(file, html(template, **found))


def html(template: str, **found: Any) -> bytes:
    """What a template, named from the package's folder, makes of what was found, all of it escaped."""
    environment = Environment(
        loader=PackageLoader("mantis_lite", "."), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    return environment.get_template(template).render(found).encode(errors="backslashreplace")


def thumbnail(picture: Picture) -> str:
    """A picture as a small JPEG in a data: URI."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def pieces(prompt: str, links: list[str]) -> list[tuple[str, str]]:
    """Text and pictures' data: URIs in turn, by the marks in a prompt. A mark that no picture is left for is text."""
    found: list[tuple[str, str]] = []
    left = iter(links)
    for number, text in enumerate(prompt.split(MARK)):
        if number:
            link = next(left, None)
            found.append(("text", MARK) if link is None else ("picture", link))
        found.append(("text", text))
    return [*found, *(("picture", link) for link in left)]  # of a clip, whose mark was one
