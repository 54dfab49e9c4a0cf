"""Lines of JSON about the steps of a run, which a full disk delays and a kill cuts at most."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DiskError
from ..files import write_whole

log = logging.getLogger("mantis_lite")


class JsonLines:
    """A file with a JSON object a line, each with the `step` it is of."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.count = 0
        self._waiting = b""

    def __len__(self) -> int:
        return self.count

    def append(self, line: dict[str, Any], mine: bool = True) -> None:
        """Add a line; where the disk is full it waits for the next, and the run goes on.

        One that is another process's to write, and not `mine`, is counted.
        """
        self.count += 1
        if not mine:
            return
        full = bool(self._waiting)
        self._waiting += json.dumps(line).encode() + b"\n"
        try:
            with self.file.open("ab", buffering=0) as opened:
                end = opened.seek(0, os.SEEK_END)
                if opened.write(self._waiting) < len(self._waiting):
                    opened.truncate(end)  # of a line, all or nothing
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting = b""
        except OSError as error:
            if not full:
                log.warning("%s cannot be written for now: %s", self.file, error.strerror)

    def rewind(self, step: int) -> None:
        """Forget what was written after a step: those steps are done again. A line that was cut short goes as well."""
        self.count = keep_whole_lines(self.file, lambda line: bool(step) and line["step"] <= step)


def keep_whole_lines(file: Path, wanted: Callable[[dict[str, Any]], bool] = lambda line: True) -> int:
    """Write a file anew with those of its lines that are whole and wanted; returns how many. Raises DiskError."""
    kept = [line for line in lines_of(file) if wanted(line)]
    try:
        if file.exists():
            write_whole(file, b"".join(json.dumps(line).encode() + b"\n" for line in kept))
    except OSError as error:
        raise DiskError(f"{file} cannot be written: {error.strerror}\n  Make room there, and run again.") from error
    return len(kept)


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, if there is one, up to the first that is not: a kill or a lost disk ends it there."""
    found = []
    for line in (file.read_bytes() if file.exists() else b"").splitlines(keepends=True):
        try:
            found.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            return found[:-1]
    return found
