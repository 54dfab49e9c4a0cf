"""Lengths remembered by content, so that a second start tokenises nothing and opens no picture."""

from __future__ import annotations

import os
import tempfile
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .packing import Length
from .schema import Sample

RECORD = np.dtype([("key", "V16"), ("tokens", "i4"), ("patches", "i4")])


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
                elif isinstance(part.source, bytes):
                    parts += (b"bytes", part.source)
                else:
                    stat = os.stat(part.source)
                    parts.append(f"{part.source}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    except (OSError, ValueError):  # the latter for a path that cannot be one
        return None
    sizes = b",".join(b"%d" % len(part) for part in parts)  # so that no two ways of cutting the text agree
    return blake2b(b"".join((sizes, b"\0", *parts)), digest_size=16).digest()


class LengthCache:
    """The remembered lengths of one encoder, in a file named by its fingerprint."""

    def __init__(self, fingerprint: str, folder: Path | None = None) -> None:
        self.path = (folder or cache_dir()) / f"lengths-{fingerprint}.npy"
        self.known = self._read()
        self.fresh = False

    def get(self, key: bytes | None) -> Length | None:
        return self.known.get(key) if key is not None else None

    def put(self, key: bytes | None, length: Length) -> None:
        if key is not None:
            self.known[key] = length
            self.fresh = True

    def save(self) -> None:
        """Write the file anew beside the old one and rename it, so that no reader sees half a file."""
        if not self.fresh:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        records = np.array([(key, *length) for key, length in self.known.items()], dtype=RECORD)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
            np.save(file, records)
        os.replace(file.name, self.path)
        self.fresh = False

    def _read(self) -> dict[bytes, Length]:
        try:
            records = np.load(self.path)
        except (FileNotFoundError, EOFError, ValueError):
            return {}  # none yet, or cut short by a full disk: it is made anew
        keys = records["key"].tobytes()
        lengths = zip(records["tokens"].tolist(), records["patches"].tolist(), strict=True)
        return {keys[i * 16 : i * 16 + 16]: Length(*length) for i, length in enumerate(lengths)}
