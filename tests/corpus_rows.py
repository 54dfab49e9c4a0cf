"""Bad and odd rows and files of rows, made from nothing, with what is to be said of each."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mantis_lite.data.lines import MAX_ROW, SMALL

IMITATIONS = [
    *("<image>", "<video>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<end_of_utterance>"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>", "<|endoftext|>"),
    *("<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "<|LABEL_1|>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|"),
    *("|IMAGE|", "<0x04>", "<0x0A>", "\x04", "USER:", "ASSISTANT:", "Assistant:", "System:"),
]
"""What templates and tokenizers write themselves."""


@dataclass(frozen=True)
class Line:
    """A row as it stands in a file, and the words that it is rejected with, if it is."""

    name: str
    written: bytes
    expected: str | None = None


@dataclass(frozen=True)
class File:
    """A file that cannot be read as a whole, and what is said of it."""

    path: Path
    expected: str


def turns(*texts: Any, **row: Any) -> dict[str, Any]:
    """A row whose turns alternate from the user's."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]} | row


def spoken(*roles: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def sound() -> list[Line]:
    """Rows that train, odd as they are."""
    # In a row of task=video "<video>" is always a mark.
    parts = [{"type": "text", "text": text} for text in IMITATIONS if text != "<video>"]
    rows: dict[str, Any] = {
        "plain": turns("Hi", "Ho"),
        "same id": turns("Hi", "Ho", id="twice"),
        "same id again": turns("Hey", "Ho", id="twice"),
        "other spelling": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        "other columns": turns("Hi", "Ho", images=None, video=None, source={"a": [1]}, score=1e400),
        "blank answer": turns("Hi", " \n"),
        "empty answer": turns("Hi", ""),
        "empty question": turns("", "Ho"),
        "last turn the user's": turns("Hi", "Ho", "And?"),
        "first turn the assistant's": spoken("assistant", "user", "assistant"),
        "<image> in text": turns("HTML has <image>", "It has."),
        "imitations": turns(parts, parts),
        "id of a terminal": turns("Hi", "Ho", id="\x1b[2J\ud83d"),
        "not Latin": turns("漢字 🙂 \u2028", "\0 \x7f é"),
    }
    lines = [Line(name, json.dumps(row).replace("Infinity", "1e400").encode()) for name, row in rows.items()]
    lines.append(Line("in UTF-8", json.dumps(turns("漢字 🙂", "é"), ensure_ascii=False).encode()))
    lines.append(Line("BOM, and a line end of Windows", b"\xef\xbb\xbf" + json.dumps(rows["plain"]).encode() + b"\r"))
    return lines


def bad() -> list[Line]:
    """Rows that cannot be trained on."""
    rows: list[tuple[str, Any, str]] = [
        ("no object", ["x"], "the row is a list, not an object"),
        ("null", None, "the row is a NoneType, not an object"),
        ("no turns", {"text": "x"}, "has the turns"),
        ("empty", turns(), '"messages" is empty'),
        ("no list", {"messages": "x"}, '"messages" is a string'),
        ("only the user", turns("Hi"), "no assistant turn after a user turn"),
        ("only the assistant", spoken("assistant"), "no assistant turn after a user turn"),
        ("two users", spoken("user", "user", "assistant"), "turns 1 and 2 are both the user's"),
        ("system later", spoken("user", "system", "assistant"), "turn 2 is the system's"),
        ("unknown role", spoken("user", "tool"), "turn 2 has the unknown role 'tool'"),
        ("no role", spoken(None, "assistant"), "turn 1 has no role"),
        ("null text", turns(None, "Ho"), "turn 1 has no text"),
        ("number for text", turns("Hi", 3), '"content" of turn 2 is a number'),
        ("no turn", {"messages": ["Hi", "Ho"]}, "turn 1 is a string"),
        ("unknown part", turns([{"type": "audio"}], "Ho"), "has the type 'audio'"),
        ("mark without a picture", turns([{"type": "image"}], "Ho"), "0 images but 1 <image> mark"),
        ("two texts", {"messages": [{"role": "user", "content": "a", "text": "b"}]}, "of turn 1 differ"),
        ("half a character", turns("\ud83d", "Ho", id="\x1b[2J"), "has half a character"),
    ]
    lines = [Line(name, json.dumps(row).encode(), said) for name, row, said in rows]
    half = json.dumps(turns("Hi", "Ho"))[:-1].encode()
    lines += [
        Line("NaN", half + b', "score": NaN}', "NaN is no JSON value"),
        Line("Infinity", half + b', "score": -Infinity}', "-Infinity is no JSON value"),
        Line("comma at the end", half + b",}", "the row is not JSON"),
        Line("half a row", half, "the row is not JSON"),
        Line("two rows", half + b"}" + half + b"}", "the row is not JSON: Extra data"),
        Line("Latin-1", half + b', "name": "caf\xe9"}', "the row is not UTF-8: byte 0xe9"),
        Line("deep", half + b', "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        Line("digits", half + b', "a": ' + b"1" * 5_000 + b"}", "the row is not JSON: Exceeds the limit"),
        Line("no text at all", b"\0\0\0", "the row is not JSON"),
        Line("huge", half + b', "a": "' + b"x" * MAX_ROW + b'"}', "more than 64 MiB"),
    ]
    return lines


def write_lines(lines: list[Line], file: Path) -> None:
    """The rows as a file of JSON Lines, with a blank line behind each."""
    file.write_bytes(b"".join(line.written + b"\n \n" for line in lines))


def write_bad_files(folder: Path) -> list[File]:
    """Files of rows that cannot be read; one is not there."""
    row = json.dumps(turns("Hi", "Ho")).encode()
    files: list[tuple[str, bytes | None, str]] = [
        ("utf-16.jsonl", row.decode().encode("utf-16"), "the file is UTF-16"),
        ("empty.jsonl", b"", "there are no rows in it"),
        ("blank.jsonl", b"\n \n", "there are no rows in it"),
        ("no-rows.json", b"[]", "there are no rows in it"),
        ("object.json", b'{"data": [' + row + b"]}", "not a list of rows"),
        ("lines.json", row + b"\n" + row, "not a list of rows"),
        ("comma.json", b"[" + row + b",\n]", "not JSON: Expecting value: line 2 column 1"),
        ("cut.json", b"[" + row + b", " + row[:-9], "not JSON: "),
        ("cut.jsonl.gz", gzip.compress(row * 9, mtime=0)[:-9], "cannot be read: "),
        ("no-gz.jsonl.gz", row, "cannot be read: Not a gzipped file"),
        ("bomb.jsonl.gz", gzip.compress(bytes(SMALL + 1), mtime=0), "unpacks to more than 100 times its size"),
        ("rows.csv", b"a,b", "not a kind of file that holds rows"),
        ("rows.parquet", b"PAR1", "not Parquet of one layout"),
        ("gone.jsonl", None, "no such file or folder"),
    ]
    for name, content, _ in files:
        if content is not None:
            (folder / name).write_bytes(content)
    return [File(folder / name, said) for name, _, said in files]
