"""Lengths remembered by content, so that a second start tokenises nothing and opens no picture."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import write_whole
from .sample import Image, Sample, Video

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


def content_key(sample: Sample) -> bytes | None:
    """A hash of what a sample says and shows: its text, its pictures' bytes or their files' name, size and time.

    None where a file cannot be found, so that the row is measured, and the error named, each time.
    """
    parts: list[bytes] = []
    try:
        for turn in sample.turns:
            parts.append(turn.role.encode())
            for part in turn.content:
                if isinstance(part, str):
                    parts.append(part.encode(errors="surrogatepass"))
                elif isinstance(part, Video):
                    parts += _of_video(part)
                else:
                    parts += _of_image(part)
    except (OSError, ValueError):  # the latter for a path that cannot be one
        return None
    sizes = b",".join(b"%d" % len(part) for part in parts)  # so that no two ways of cutting the text agree
    return blake2b(b"".join((sizes, b"\0", *parts)), digest_size=16).digest()


def _of_image(image: Image) -> list[bytes]:
    if isinstance(image.source, bytes):
        return [b"bytes", image.source]
    return [_of_file(image.source)]


def _of_video(video: Video) -> Iterator[bytes]:
    yield f"{'frames' if isinstance(video.source, tuple) else 'clip'}\0{video.start}\0{video.end}".encode()
    if isinstance(video.source, tuple):
        for image in video.source:
            yield from _of_image(image)
    else:
        yield _of_file(video.source)
        if video.source.is_dir():
            yield from (_of_file(file) for file in sorted(video.source.iterdir()))


def _of_file(path: Path) -> bytes:
    stat = os.stat(path)
    return f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()


class LengthCache:
    """The remembered lengths of one encoder, in a file named by its fingerprint."""

    def __init__(self, fingerprint: str, folder: Path | None = None) -> None:
        self.path = (folder or cache_dir()) / f"lengths-{fingerprint}.npy"
        self.known = self._read()
        self.fresh = False

    def get(self, key: bytes | None) -> Measured | None:
        return self.known.get(key) if key is not None else None

    def put(self, key: bytes | None, length: Measured) -> None:
        if key is not None:
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
