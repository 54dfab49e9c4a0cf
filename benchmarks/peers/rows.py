"""The rows that every tool trains on: some of Mantis' own examples, or drawn ones, written as each tool reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from .. import results

EXAMPLES = results.SHARED / "mantis-examples/chat/train.json"
MARK = "<image>"
WORDS = ("red", "circle", "image", "which", "square", "the", "shows", "is", "and", "two")


@dataclass(frozen=True)
class Row:
    """A conversation: where its pictures are, and (role, text) of each turn, in which MARK stands for a picture."""

    pictures: list[Path]
    turns: list[tuple[str, str]]


def real(number: int, file: Path = EXAMPLES) -> list[Row]:
    """So many rows of Mantis' example data, evenly over the file; all where it has no more."""
    rows = json.loads(file.read_text())
    chosen = rows[:: max(1, len(rows) // number)][:number]
    return [
        Row(
            [file.parent / name for name in row["images"]],
            [(turn["role"], turn["content"]) for turn in row["conversation"]],
        )
        for row in chosen
    ]


def drawn(number: int, folder: Path) -> list[Row]:
    """So many rows of seeded words with one to five pictures of noise, which are written to `folder`."""
    random = np.random.default_rng(0)
    pictures = []
    for at, (width, height) in enumerate([(320, 240), (240, 320), (280, 280)]):
        pictures.append(folder / f"{at}.jpg")
        PIL.Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(pictures[-1])

    def said(words: int) -> str:
        return " ".join(random.choice(WORDS, words))

    rows = []
    for _ in range(number):
        shown = [pictures[at] for at in random.integers(0, len(pictures), random.integers(1, 6))]
        turns = [("user", MARK * len(shown) + said(20)), ("assistant", said(40))]
        turns += [("user", said(20)), ("assistant", said(40))] * int(random.integers(1, 8))
        rows.append(Row(shown, turns))
    return rows


def wrapped(row: Row) -> list[tuple[str, str]]:
    """The turns with Mantis' words around each picture, which this package writes itself."""
    number = count(1)

    def written(text: str) -> str:
        first, *rest = text.split(MARK)
        return first + "".join(f"(image {next(number)}: <Image>{MARK}</Image>){part}" for part in rest)

    return [(role, written(text)) for role, text in row.turns]


def write(rows: list[Row], folder: Path) -> None:
    """Write ours.json as this package reads rows, marked.json as LLaMA-Factory and ms-swift do, parts.json as TRL."""
    ours, marked, parts = [], [], []
    for row in rows:
        images = {"images": [str(picture) for picture in row.pictures]}
        ours.append(images | {"messages": _messages(row.turns)})
        marked.append(images | {"messages": _messages(wrapped(row))})
        turns = [{"role": role, "content": _parts(text)} for role, text in wrapped(row)]
        parts.append(images | {"messages": turns})
    for name, content in {"ours": ours, "marked": marked, "parts": parts}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    columns = {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    told = {"file_name": "marked.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"marked": told}))


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _parts(text: str) -> list[dict[str, Any]]:
    """A turn as a list of texts and pictures."""
    first, *rest = text.split(MARK)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for part in rest:
        parts += [{"type": "image"}, {"type": "text", "text": part}]
    return [part for part in parts if part.get("text") != ""]
