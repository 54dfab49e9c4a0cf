"""What a sample says and shows, hashed: as its files lie here, and as they would be anywhere."""

from __future__ import annotations

import json
import os
import stat
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from .sample import Image, Sample, Video
from .zipped import Zipped


class Content(NamedTuple):
    """`key`, 16 bytes, changes with a file's path, size and time; `digest`, of 64 bits with a sign, with its name and
    size alone, since a copied folder has other times and paths, and with the sample's labels."""

    key: bytes
    digest: int


def content_of(sample: Sample) -> Content | None:
    """The hashes of a sample; None where a file of it cannot be found, or its path cannot be one."""
    try:
        parts = _Parts(sample)
    except (OSError, ValueError):
        return None
    labels = b"null" if sample.labels is None else json.dumps(sample.labels, sort_keys=True, default=str).encode()
    digest = int.from_bytes(_hash([*parts.anywhere, labels], 8), "little", signed=True)
    return Content(_hash(parts.here, 16), digest)


def files_of(sample: Sample) -> list[Path] | None:
    """The files of a sample's pictures and clips; None where some are in no file of their own. Raises OSError."""
    found = [image.source for image in sample.images]
    for video in sample.videos:
        if isinstance(video.source, tuple):
            found += [frame.source for frame in video.source]
        else:
            found += [video.source, *(video.source.iterdir() if video.source.is_dir() else ())]
    files = [file for file in found if isinstance(file, Path)]
    return files if len(files) == len(found) else None


class _Parts:
    """A sample piece by piece, as bytes: what each is known by `here`, and `anywhere`. Raises OSError, ValueError."""

    def __init__(self, sample: Sample) -> None:
        self.here: list[bytes] = []
        self.anywhere: list[bytes] = []
        for turn in sample.turns:
            self._add(turn.role.encode())
            for part in turn.content:
                if isinstance(part, str):
                    self._add(part.encode(errors="surrogatepass"))
                elif isinstance(part, Video):
                    self._add_video(part)
                else:
                    self._add_image(part)

    def _add(self, piece: bytes) -> None:
        self.here.append(piece)
        self.anywhere.append(piece)

    def _add_image(self, image: Image) -> None:
        if isinstance(image.source, bytes):
            self._add(b"bytes")
            self._add(image.source)
        elif isinstance(image.source, Zipped):
            self.here.append(image.source.here)
            self.anywhere.append(image.source.anywhere)
        else:
            self._add_file(image.source)

    def _add_video(self, video: Video) -> None:
        kind = "frames" if isinstance(video.source, tuple) else "clip"
        self._add(f"{kind}\0{video.start}\0{video.end}".encode())
        if isinstance(video.source, tuple):
            for image in video.source:
                self._add_image(image)
        else:
            self._add_file(video.source)
            if video.source.is_dir():
                for file in sorted(video.source.iterdir()):
                    self._add_file(file)

    def _add_file(self, path: Path) -> None:
        name = os.fsencode(path)
        found = os.stat(name)
        size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
        self.here.append(b"%b\0%d\0%d" % (name, found.st_size, found.st_mtime_ns))
        self.anywhere.append(b"%b\0%d" % (name.rpartition(b"/")[2], size))


def _hash(parts: list[bytes], size: int) -> bytes:
    sizes = ",".join(map(str, map(len, parts))).encode()  # so that no two ways of cutting the text agree
    return blake2b(b"".join((sizes, b"\0", *parts)), digest_size=size).digest()
