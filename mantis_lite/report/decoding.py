"""Every picture and clip of samples decoded, each once: what is wrong with which, and the files that were read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from ..data import media
from ..data.chunks import as_it_is
from ..data.content import files_of
from ..data.encode import Encoder
from ..data.prepare import Samples
from ..data.sample import Frame, Image, Sample
from ..errors import SampleError
from ..process import cores

MOST_WORKERS = 16
"""Processes that decode: the disk is the slowest then."""
AT_A_TIME = 16
"""Rows of which such a process tells together, at most."""
Watch = Callable[[Iterable[SampleError | None], int], Iterable[SampleError | None]]
"""Takes what is found of each row, in turn, and how many there will be, and hands it on."""


def named_files(sample: Sample) -> list[str | None]:
    """The files of a sample's pictures and clips; None for all of them where one is in no file, or is there no more."""
    try:
        files = files_of(sample)
    except OSError:
        files = None
    return [None] if files is None else [str(file) for file in files]


def sound(
    samples: Samples, encoder: Encoder, rejects: list[SampleError], files: set[str | None], watch: Watch
) -> Samples:
    """Those whose pictures and clips can be decoded, their `files`; what is wrong with the others joins `rejects`."""
    pictured = np.flatnonzero(samples.images)
    workers = min(cores(), MOST_WORKERS, len(pictured))
    each = min(AT_A_TIME, 1 + len(pictured) // (4 * cores()))  # of a few rows all processes have some
    rows = Decoded(samples, [pictured[at : at + each] for at in range(0, len(pictured), each)], encoder)
    loaded: Iterable[list[Found]] = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        collate_fn=as_it_is,
    )
    broken = []

    def faults() -> Iterator[SampleError | None]:
        for fault, more in chain.from_iterable(loaded):
            files.update(more)
            yield fault

    for at, fault in zip(pictured, watch(faults(), len(pictured)), strict=True):
        if fault is not None:
            rejects.append(fault)
            broken.append(at)
    return samples.take(np.delete(np.arange(len(samples)), broken)) if broken else samples


class Found(NamedTuple):
    """What decoding the pictures of a sample came to: what is wrong, and the files it names that were not told yet."""

    fault: SampleError | None
    files: list[str | None]


@dataclass(frozen=True)
class Decoded:
    """What decoding the pictures of samples comes to, a few samples at a time; no process decodes a picture twice."""

    samples: Samples
    few: list[np.ndarray]
    encoder: Encoder
    sound: set[int] = field(default_factory=set)
    """Pictures that need not be decoded again: 64 bits of each, as there may be millions."""

    def __len__(self) -> int:
        return len(self.few)

    def __getitem__(self, at: int) -> list[Found]:
        return [self._found(self.samples[index]) for index in self.few[at]]

    def _found(self, sample: Sample) -> Found:
        try:
            new = self._decode(sample)
        except SampleError as error:
            return Found(error, [])
        if sample.videos:
            return Found(None, named_files(sample))
        return Found(None, [str(image.source) if isinstance(image.source, Path) else None for image in new])

    def _decode(self, sample: Sample) -> list[Image]:
        """Decode the pictures of a sample that are not known to be sound, as a step would. Raises SampleError."""
        frames = self.encoder.frames
        laid_out = frames.lay_out(sample)
        known = [_key(image) for image in laid_out.images]
        new = [image for image, key in zip(laid_out.images, known, strict=True) if key not in self.sound]
        frames.open(laid_out, self.encoder.max_image_size, new)
        self.sound.update(key for key in known if key is not None)
        return new


def _key(image: Image) -> int | None:
    """A hash of a picture's file, its size and time, and which of a clip's it is; None where it is in no file."""
    if isinstance(image.source, bytes):
        return None
    try:
        found = media.file_now(image.source)
    except (OSError, ValueError):  # decoding says what is wrong
        return None
    return hash((found, image.at if isinstance(image, Frame) else None))
