"""Lengths remembered by content, so that a second start tokenises nothing and opens no picture."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import write_whole

log = logging.getLogger("mantis_lite")


class Measured(NamedTuple):
    """What a sample comes to: tokens of the language model, positions of the vision tower, and pictures.

    `cut` are those pictures whose files have more behind the first, as an animation has.
    """

    tokens: int
    patches: int
    images: int
    cut: int = 0


RECORD = np.dtype([("key", "V16"), *((name, "i4") for name in Measured._fields)])


def cache_dir() -> Path:
    """Where remembered lengths are kept: $MANTIS_LITE_CACHE, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MANTIS_LITE_CACHE") or Path(home) / "mantis_lite")


class LengthCache:
    """The remembered lengths of one encoder, in a file named by its fingerprint."""

    def __init__(self, fingerprint: str, folder: Path | None = None) -> None:
        self.path = (folder or cache_dir()) / f"lengths-{fingerprint}.npy"
        self.known = self._read()
        self.fresh = False

    def get(self, key: bytes) -> Measured | None:
        return self.known.get(key)

    def put(self, key: bytes, length: Measured) -> None:
        self.known[key] = length
        self.fresh = True

    def save(self) -> None:
        """Write the file anew; where it cannot be, rows are measured again the next time, with a warning."""
        if not self.fresh:
            return
        content = io.BytesIO()
        np.save(content, np.fromiter(((key, *length) for key, length in self.known.items()), RECORD, len(self.known)))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, content.getvalue(), synced=False)
            self.fresh = False
        except OSError as error:
            log.warning("lengths are not remembered: %s cannot be written: %s", self.path, error.strerror)

    def _read(self) -> dict[bytes, Measured]:
        try:
            records = np.load(self.path)
        except (OSError, EOFError, ValueError):
            return {}  # none yet, or cut short by a full disk: it is made anew
        if records.dtype != RECORD:
            return {}  # of an earlier version
        keys = records["key"].tobytes()
        lengths = zip(*(records[name].tolist() for name in Measured._fields), strict=True)
        return {keys[i * 16 : i * 16 + 16]: Measured(*length) for i, length in enumerate(lengths)}
