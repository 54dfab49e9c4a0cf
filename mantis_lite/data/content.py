"""What a sample says and shows, hashed: as its files lie here, and as they would be anywhere."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
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


class _File(NamedTuple):
    path: Path
    found: os.stat_result

    @property
    def here(self) -> bytes:
        return os.fsencode(f"{self.path}\0{self.found.st_size}\0{self.found.st_mtime_ns}")

    @property
    def anywhere(self) -> bytes:
        return os.fsencode(f"{self.path.name}\0{0 if stat.S_ISDIR(self.found.st_mode) else self.found.st_size}")


def content_of(sample: Sample) -> Content | None:
    """The hashes of a sample; None where a file of it cannot be found, or its path cannot be one."""
    try:
        parts = list(_parts(sample))
    except (OSError, ValueError):
        return None
    labels = b"null" if sample.labels is None else json.dumps(sample.labels, sort_keys=True, default=str).encode()
    here = [part if isinstance(part, bytes) else part.here for part in parts]
    anywhere = [part if isinstance(part, bytes) else part.anywhere for part in parts]
    return Content(_hash(here, 16), int.from_bytes(_hash([*anywhere, labels], 8), "little", signed=True))


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


def _parts(sample: Sample) -> Iterator[bytes | _File | Zipped]:
    for turn in sample.turns:
        yield turn.role.encode()
        for part in turn.content:
            if isinstance(part, str):
                yield part.encode(errors="surrogatepass")
            else:
                yield from _of_video(part) if isinstance(part, Video) else _of_image(part)


def _of_image(image: Image) -> Iterator[bytes | _File | Zipped]:
    if isinstance(image.source, bytes):
        yield from (b"bytes", image.source)
    elif isinstance(image.source, Zipped):
        yield image.source
    else:
        yield _of_file(image.source)


def _of_video(video: Video) -> Iterator[bytes | _File | Zipped]:
    yield f"{'frames' if isinstance(video.source, tuple) else 'clip'}\0{video.start}\0{video.end}".encode()
    if isinstance(video.source, tuple):
        for image in video.source:
            yield from _of_image(image)
    else:
        yield _of_file(video.source)
        if video.source.is_dir():
            yield from (_of_file(file) for file in sorted(video.source.iterdir()))


def _of_file(path: Path) -> _File:
    return _File(path, os.stat(path))


def _hash(parts: list[bytes], size: int) -> bytes:
    sizes = ",".join(map(str, map(len, parts))).encode()  # so that no two ways of cutting the text agree
    return blake2b(b"".join((sizes, b"\0", *parts)), digest_size=size).digest()
