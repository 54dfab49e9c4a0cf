"""What a row says and shows, as a number: two rows are the same where it is."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from .sample import Image, Sample, Video


def digest(sample: Sample) -> int:
    """A hash of a sample's turns, labels and media, as a signed 64-bit number.

    Pictures given as bytes count by these; files by name and size, since a copied folder has other times and paths.
    """
    parts: list[bytes] = []
    for turn in sample.turns:
        parts.append(turn.role.encode())
        for part in turn.content:
            if isinstance(part, str):
                parts.append(part.encode(errors="surrogatepass"))
            else:
                parts += _of_video(part) if isinstance(part, Video) else _of_image(part)
    parts.append(json.dumps(sample.labels, sort_keys=True, default=str).encode())
    sizes = b",".join(b"%d" % len(part) for part in parts)  # so that no two ways of cutting the text agree
    found = blake2b(b"".join((sizes, b"\0", *parts)), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


def _of_image(image: Image) -> Iterator[bytes]:
    if isinstance(image.source, bytes):
        yield image.source
    else:
        yield _of_file(image.source)


def _of_video(video: Video) -> Iterator[bytes]:
    yield f"{video.start}\0{video.end}".encode()
    if isinstance(video.source, tuple):
        for image in video.source:
            yield from _of_image(image)
    else:
        yield _of_file(video.source)


def _of_file(path: Path) -> bytes:
    found = os.stat(path)
    return os.fsencode(f"{path.name}\0{0 if stat.S_ISDIR(found.st_mode) else found.st_size}")
