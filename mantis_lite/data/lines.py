"""The rows of a JSON or JSON Lines file: found once, and read from the file one at a time."""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Self

import numpy as np

from .columns import Fault

MAX_ROW = 64 << 20
"""Bytes of a row, with the pictures written into it; a larger one is more likely a file without line ends."""
MAX_EXPANSION = 100
"""How many times its size a .gz file may come to: rows come to 5 or 10 times, and what is made to harm to 1,000."""
SMALL = 64 << 20
"""Bytes that any .gz file may come to."""
BLOCK = 1 << 20
"""Bytes read at a time."""
LONGEST_WORD = 16
"""Characters of JSON outside of strings that mean something together, at the most."""
BLANKS = re.compile(r"[ \t\n\r]*")
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class Lines(Sequence[Any]):
    """The rows of a file, which stays on disk: 24 bytes a row are held. Raises Fault.

    Of a .json file a row is an element of its list, else a line that is not blank; `numbers` (N,) counts both from 1.
    A .gz file is unpacked into a temporary one. Copies of a pickle open the file again.
    """

    def __init__(self, path: Path) -> None:
        with _open(path) as file:
            if file.read(2) in UTF_16:
                raise Fault("the file is UTF-16", "Write it as UTF-8.")
            file.seek(0)
            found = _elements(file) if path.name.removesuffix(".gz").endswith(".json") else _lines(file)
            places = array("q", chain.from_iterable(found))
            self._hold(path, file)
        self._places = np.array(places, np.int64).reshape(-1, 3)

    @classmethod
    def again(cls, path: Path, written: tuple[int, int], places: np.ndarray) -> Self:
        """The rows of a file that were found before: by where they are (N, 3), and its size and time then."""
        lines = cls.__new__(cls)
        lines.__setstate__({"path": path, "written": written, "places": places})
        return lines

    @property
    def numbers(self) -> np.ndarray:
        return self._places[:, 2]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: Any) -> Any:
        start, size, _ = self._places[at].tolist()
        if size > MAX_ROW:
            found = f"the row has {size:,} bytes, more than {MAX_ROW >> 20} MiB"
            raise Fault(found, "Write each row on a line of its own, and its pictures as files.")
        if _stamp(os.fstat(self._file)) != self._stamp:
            raise Fault("the file has changed since it was opened", "Start again, and let it be until the end.")
        return _loads(os.pread(self._file, size, start))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "written": self._written, "places": self._places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._places = state["places"]
        with _open(state["path"]) as file:
            self._hold(state["path"], file)
        if self._written != state["written"]:
            self._stamp = (-1, -1)  # no file's: the first row that is read says so

    def _hold(self, path: Path, file: BinaryIO) -> None:
        self._path, self._written = path, _stamp(path.stat())
        self._file = os.dup(file.fileno())  # a number alone: processes forked from this one read by it too
        self._stamp = _stamp(os.fstat(self._file))
        weakref.finalize(self, os.close, self._file)


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _open(path: Path) -> BinaryIO:
    """The file, or a temporary one with what a .gz file unpacks to."""
    try:
        return _unpacked(path) if path.name.endswith(".gz") else path.open("rb")
    except (OSError, EOFError, zlib.error) as error:
        raise Fault(f"cannot be read: {error}", "Make the file again, or room for what it unpacks to.") from None


def _unpacked(path: Path) -> BinaryIO:
    most = max(SMALL, MAX_EXPANSION * path.stat().st_size)
    file: BinaryIO = tempfile.TemporaryFile()  # type: ignore[assignment]
    with gzip.open(path) as packed:
        while block := packed.read(BLOCK):
            if file.tell() + len(block) > most:
                found = f"unpacks to more than {MAX_EXPANSION} times its size, {most:,} bytes"
                raise Fault(found, "Unpack it yourself, if you trust it.")
            file.write(block)
    file.flush()
    file.seek(0)
    return file


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Where each line begins, its size in bytes and its number, of those that are not blank."""
    start = at = 0
    number, blank = 1, True
    while piece := file.readline(BLOCK):
        blank = blank and piece.isspace()
        at += len(piece)
        if piece.endswith(b"\n"):
            if not blank:
                yield start, at - start, number
            start, number, blank = at, number + 1, True
    if not blank:
        yield start, at - start, number


def _elements(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Where each element of a JSON list begins, its size in bytes and its number."""
    window = _Window(file)
    if window.next() != "[":
        raise Fault("not a list of rows", "Write it as [{...}, {...}]; if each line is a row, name it .jsonl.")
    window.at += 1
    mark = window.next()
    for number in count(1):
        if number == 1 and mark == "]":
            break
        yield *window.value(), number
        mark = window.next()
        if mark == "]":
            break
        if mark != ",":
            window.refuse("expected a comma, or the list's end", window.at)
        window.at += 1
    window.at += 1
    if window.next():
        window.refuse("more behind the list's end", window.at)


class _Window:
    """A stretch of a JSON file, moved along it; read as Latin-1, so that a character is a byte."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.text, self.at = file, "", 0
        self.base = file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
        # Numbers are left as they are: one too long for Python is a fault of its row.
        self.decode = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode

    def next(self) -> str:
        """The next character that is not blank, where `at` then stands; "" at the file's end."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self) -> tuple[int, int]:
        """Where the next value begins, and its size in bytes; `at` then stands behind it."""
        self.next()
        while True:
            try:
                error, end = None, self.decode(self.text, self.at)[1]
            except json.JSONDecodeError as found:
                error, end = found, found.pos
            except RecursionError:
                self.refuse("lists or objects nested too deeply", self.at)
            # A string without an end, and what stops in sight of the window's (a word, an escape, -2.5e3), may go on.
            cut = end > len(self.text) - LONGEST_WORD or (error and error.msg.startswith("Unterminated string"))
            if error and cut and len(self.text) - self.at > MAX_ROW:
                self.refuse(f"a row without an end within {MAX_ROW >> 20} MiB", self.at)
            if not (cut and self._more()):
                break
        if error:
            self.refuse(error.msg, error.pos)
        start, self.at = self.at, end
        return self.base + start, end - start

    def refuse(self, what: str, at: int) -> NoReturn:
        """Raise Fault with the line and column of a place in the window."""
        self.file.seek(0)
        lines = column = 0
        left = self.base + at
        while left:
            block = self.file.read(min(BLOCK, left))
            left -= len(block)
            lines += block.count(b"\n")
            column = len(block) - block.rindex(b"\n") - 1 if b"\n" in block else column + len(block)
        raise Fault(f"not JSON: {what}: line {lines + 1} column {column + 1}", "Mend it there.")

    def _more(self) -> bool:
        """Let go of what is behind `at` and read at least as much as is left; or leave all as it is at the end."""
        block = self.file.read(max(BLOCK, len(self.text) - self.at))
        if block:
            self.base += self.at
            self.text, self.at = self.text[self.at :] + block.decode("latin-1"), 0
        return bool(block)


def _loads(row: bytes) -> Any:
    try:
        return DECODER.decode(row.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        found = f"the row is not UTF-8: byte {row[error.start]:#04x} at {error.start + 1}"
        raise Fault(found, "Save the file as UTF-8.") from None
    except RecursionError:
        raise Fault("the row has lists or objects nested too deeply", "Each row is one flat object.") from None
    except ValueError as error:
        found = f"the row is not JSON: {error}".replace("line 1 column", "column")
        raise Fault(found, "Each row is one whole JSON object, in a .jsonl file on one line.") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
"""Takes no NaN and no Infinity, which Python's own would."""
