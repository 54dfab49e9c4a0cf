"""A folder, here or behind a URL: its files are read, and put there whole."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from ..errors import DataError, one_line
from ..files import sync, write_whole

log = logging.getLogger("mantis_lite")

PAUSES = (1, 5, 20)
"""Seconds before what failed on its way is tried again."""


def is_url(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True)
class Place:
    """A folder by its path, or by a URL that fsspec knows: s3://, gs://, https://, memory://, file://, ...

    What fails behind a URL is tried again after PAUSES, and then a DataError that names it.
    """

    url: str

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one of this machine."""
        if self.url.startswith("file://"):
            return Path(self.url.removeprefix("file://"))
        return None if is_url(self.url) else Path(self.url)

    def sizes(self) -> dict[str, int]:
        """The files there, by name, and their bytes; none where there is no such folder."""
        if self.folder is not None:
            files = self.folder.iterdir() if self.folder.is_dir() else ()
            return {file.name: file.stat().st_size for file in files if file.is_file()}

        def listed(system: Any, path: str) -> dict[str, int]:
            system.invalidate_cache()
            return {entry["name"].rpartition("/")[2]: entry["size"] for entry in system.ls(path, detail=True)}

        try:
            return self.lasting(listed)
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None where there is no such file."""
        try:
            if self.folder is not None:
                return (self.folder / name).read_bytes()
            return self.lasting(lambda system, path: system.cat_file(path), name)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, content)
        else:
            self.lasting(lambda system, path: system.pipe_file(path, content), name)

    def put(self, file: Path, name: str) -> None:
        """Move a file there, from the same disk, or send it."""
        if self.folder is not None:
            sync(file)
            os.replace(file, self.folder / name)
        else:
            self.lasting(lambda system, path: system.put_file(str(file), path), name)

    def remove(self, name: str) -> None:
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)
        else:
            self.lasting(lambda system, path: system.rm_file(path), name)

    def lasting(self, call: Callable[[Any, str], Any], name: str = "") -> Any:
        """What a call of a filesystem and a path in it returns. Raises FileNotFoundError, DataError."""
        url = f"{self.url.rstrip('/')}/{name}" if name else self.url.rstrip("/")
        for pause in (*PAUSES, None):
            try:
                return call(*_opened(url))
            except FileNotFoundError:
                raise
            except _failures() as error:
                said = one_line(error) or type(error).__name__
                if pause is None or isinstance(error, PermissionError):
                    remedy = "Look at the network and at what may be read there; the same command goes on."
                    raise DataError(f"{url}: {said}\n  {remedy}") from None
                log.warning("%s: %s; tried again in %d s", url, said, pause)
                time.sleep(pause)


def _opened(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, made anew in a process that was forked, and the path in it. Raises DataError."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # its words name the package
        raise DataError(f"{url}: {one_line(error)}\n  Install what its protocol needs, with pip.") from None
    except ValueError as error:
        raise DataError(f"{url}: {one_line(error)}\n  Give a URL whose protocol fsspec knows.") from None


def _failures() -> tuple[type[Exception], ...]:
    """What is raised of a network: aiohttp's errors are no OSErrors, and who raises them has imported it."""
    aiohttp = sys.modules.get("aiohttp")
    return (OSError,) if aiohttp is None else (OSError, aiohttp.ClientError)
