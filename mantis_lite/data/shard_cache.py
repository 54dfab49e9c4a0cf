"""Files behind a URL, kept on this machine's disk as long as there is room: whole and verified, or absent."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from ..errors import DataError
from .place import Place

PART = ".part"
LOCK = ".lock"
ROOM = "room.lock"
WAIT = 0.05
"""Seconds between looks at whether another process has let go of room."""


class File(NamedTuple):
    """A file as it was written: its name, bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardCache:
    """Files by their content in a folder of at most `limit` bytes, which processes of a machine share.

    What was used the longest ago goes first. A file that is open when it goes can be read to its end.
    """

    folder: Path
    limit: int

    def open(self, place: Place, file: File) -> BinaryIO:
        """A file of a place, fetched where it is not here. Raises DataError."""
        while True:
            try:
                return self.fetch(place, file).open("rb")
            except FileNotFoundError:  # gone in this moment, for another's sake
                continue

    def fetch(self, place: Place, file: File) -> Path:
        """See that a file is here; where several processes want it, one fetches it. Raises DataError."""
        path = self.folder / f"{file.sha256[:32]}-{file.name}"
        if _used(path):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}{LOCK}"):
            if _used(path):
                return path
            part = Path(f"{path}.{file.bytes}{PART}")
            part.unlink(missing_ok=True)  # of one that was killed: it would count beside what is reserved for this
            self._make_room(part, place, file)
            try:
                self._get(place, file, part)
                with FileLock(self.folder / ROOM):  # who looks for room might see it under neither name
                    os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        return path

    def _get(self, place: Place, file: File, part: Path) -> None:
        def get(system: Any, path: str) -> None:
            system.get_file(path, str(part))
            with part.open("rb") as opened:
                if file_digest(opened, "sha256").hexdigest() != file.sha256:
                    raise OSError("its bytes are not those that were written there")

        try:
            place.lasting(get, file.name)
        except FileNotFoundError:
            found = f"{place.url}: no {file.name}, which its shards.json names"
            raise DataError(f"{found}\n  Copy it there again, or prepare the shards again.") from None

    def _make_room(self, part: Path, place: Place, file: File) -> None:
        """Reserve room by an empty file, whose name says how large it will be."""
        if file.bytes > self.limit:
            found = f"{file.name} of {place.url} has {file.bytes:,} bytes"
            raise DataError(f"data.cache_size: {self.limit:,} bytes, and {found}\n  Raise it.")
        while True:
            with FileLock(self.folder / ROOM):
                if self._spare(file.bytes):
                    part.touch()
                    return
            time.sleep(WAIT)  # what others are fetching is whole before long, and may go then

    def _spare(self, wanted: int) -> bool:
        """Remove what was used the longest ago, until so many bytes are free."""
        whole = []
        taken = 0
        for path in self.folder.iterdir():
            if path.name.endswith(PART):
                taken += 0 if _left_behind(path) else _size_to_be(path)
            elif not path.name.endswith(LOCK):
                found = path.stat()
                whole.append((found.st_mtime_ns, found.st_size, path))
        taken += sum(size for _, size, _ in whole)
        for _, size, path in sorted(whole):
            if taken + wanted <= self.limit:
                break
            path.unlink()
            taken -= size
        return taken + wanted <= self.limit


def _used(path: Path) -> bool:
    """Whether a file is here; it counts as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _size_to_be(part: Path) -> int:
    return int(part.name.removesuffix(PART).rpartition(".")[2])


def _left_behind(part: Path) -> bool:
    """Whether who was fetching it is gone, and so it."""
    lock = FileLock(part.with_name(part.name.removesuffix(PART).rpartition(".")[0] + LOCK))
    try:
        with lock.acquire(blocking=False):
            part.unlink(missing_ok=True)
            return True
    except Timeout:
        return False
