"""What a vision tower made of pictures, kept by their content: in memory, or in files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ..errors import DiskError
from ..files import write_whole
from .lengths import cache_dir
from .media import file_now, stream
from .sample import Frame, Image
from .vision import Pixels
from .zipped import Zipped

SIZE = "size"
"""The name of a picture's (width, height) among its features, so that it need not be opened to be written out."""


class Features:
    """Features by a picture's content, in memory until `keep_on_disk` names the place of their files.

    Those of a picture are tensors by name, in place of the arrays that its pixels would be.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._held: dict[str, Pixels] = {}
        self._digests: dict[tuple[Path | Zipped, int, int], str] = {}

    def keep_on_disk(self, facts: Mapping[str, Any]) -> None:
        """Keep them in the user's cache from now on, apart from those with other `facts`, which are written beside.

        Raises DiskError where no folder can be made there.
        """
        text = json.dumps(facts, indent=2, sort_keys=True)
        self.folder = cache_dir() / "features" / sha256(text.encode()).hexdigest()[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "what-made-them.json", text.encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def key(self, image: Image) -> str:
        """A hash of the picture's bytes, or of its clip's with the frame's place in it. Raises OSError.

        A file is hashed anew when its size or time of change is another.
        """
        if isinstance(image.source, bytes):
            return sha256(image.source).hexdigest()
        known = file_now(image.source)
        if known not in self._digests:
            with stream(image.source) as file:
                self._digests[known] = file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        digest = self._digests[known]
        return f"{digest}-{image.at!r}" if isinstance(image, Frame) else digest

    def find(self, image: Image) -> Pixels | None:
        """What is kept of a picture as its file is now, if anything."""
        try:
            return self.get(self.key(image))
        except OSError:
            return None

    def get(self, key: str) -> Pixels | None:
        """What is kept under a key; None where nothing is, or a file is not as it was written."""
        return self._held.get(key) if self.folder is None else _read(self.folder / f"{key}.safetensors")

    def put(self, key: str, features: Pixels) -> None:
        """Keep a picture's features. Raises DiskError where they cannot be written."""
        if self.folder is None:
            self._held[key] = features
            return
        whole = {"crc32": str(_checksum(features))}
        try:
            write_whole(self.folder / f"{key}.safetensors", safetensors.torch.save(features, whole), synced=False)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> DiskError:
        found = f"disk, and {self.folder} cannot be written: {error.strerror}"
        remedy = "Let MANTIS_LITE_CACHE name another folder, or leave it out."
        return DiskError(f"memory.vision_cache: {found}\n  {remedy}")


def _read(file: Path) -> Pixels | None:
    try:
        with safe_open(file, "pt") as stored:
            features = {name: stored.get_tensor(name) for name in stored.keys()}
            expected = (stored.metadata() or {}).get("crc32")
    except (OSError, SafetensorError):  # none yet, or cut short: it is made anew
        return None
    return features if str(_checksum(features)) == expected else None


def _checksum(features: Pixels) -> int:
    found = 0
    for name, value in sorted(features.items()):
        found = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), found)
        found = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy(), found)
    return found
