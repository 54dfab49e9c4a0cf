"""Pictures: their size from the header alone, and their pixels. Both agree on the size."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import imagesize
import PIL.Image

from ..errors import SampleError
from .sample import Frame, Image, Sample

MIN_SIDE = 16  # px: upstream enlarges smaller pictures, for the vision processors' sake
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")


def size(image: Image, sample: Sample, max_size: int | None = None) -> tuple[int, int]:
    """The (width, height) in pixels that `open_image` will return, from the header; raises SampleError."""
    if isinstance(image, Frame):
        return _fitted(image.size, max_size)
    if isinstance(image.source, Path) and (found := _jpeg_size(image.source)):
        return _fitted(found, max_size)
    with _opened(image, sample) as picture:
        return _fitted(picture.size, max_size)


def open_image(image: Image, sample: Sample, max_size: int | None = None) -> PIL.Image.Image:
    """Decode a picture to RGB, its longest side at most `max_size` pixels; raises SampleError.

    As upstream: transparency is dropped; a shorter side below 16 px is enlarged to 16, whatever `max_size`.
    """
    with _opened(image, sample) as picture:
        # No EXIF transposition, as upstream does none: pictures are seen as they were in training.
        return fit(picture.convert("RGB"), max_size)


def fit(pixels: PIL.Image.Image, max_size: int | None) -> PIL.Image.Image:
    """A picture scaled to what `size` says of it."""
    wanted = _fitted(pixels.size, max_size)
    return pixels if pixels.size == wanted else pixels.resize(wanted)


def _jpeg_size(path: Path) -> tuple[int, int] | None:
    """A JPEG's size, four times as fast as Pillow opens it; None where Pillow must look, or say what is wrong."""
    if path.suffix.lower() not in (".jpg", ".jpeg"):
        return None
    try:
        width, height = imagesize.get(path, exif_rotation=False)
    except (OSError, ValueError, struct.error):
        return None
    sound = width > 0 and height > 0 and width * height <= (PIL.Image.MAX_IMAGE_PIXELS or 0)
    return (width, height) if sound else None


def _fitted(found: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    scale = min(1.0, max_size / max(found)) if max_size else 1.0
    if int(min(found) * scale) < MIN_SIDE:
        scale = MIN_SIDE / min(found)
    return int(found[0] * scale), int(found[1] * scale)  # rounded down, as upstream rounds


@contextmanager
def _opened(image: Image, sample: Sample) -> Iterator[PIL.Image.Image]:
    """Open the header; a failure here or in the body, where pixels are read, becomes a SampleError."""
    try:
        with PIL.Image.open(io.BytesIO(image.source) if isinstance(image.source, bytes) else image.source) as picture:
            if picture.mode.startswith(("I", "F")):
                # Pillow would clip these to white without a word.
                raise ValueError(f"more than 8 bits a colour (mode {picture.mode})")
            yield picture
    except FileNotFoundError:
        assert isinstance(image.source, Path)
        raise missing(image.source, sample) from None
    except PIL.UnidentifiedImageError:
        raise _unreadable(image, sample, "not a picture in a format that Pillow knows") from None
    except PIL.Image.DecompressionBombError as error:
        raise _unreadable(image, sample, f"too large: {error}") from None
    except OSError as error:
        raise _unreadable(image, sample, error.strerror or str(error)) from None
    except (SyntaxError, ValueError) as error:  # Pillow's own, for a broken PNG and the like
        raise _unreadable(image, sample, str(error)) from None


def _unreadable(image: Image, sample: Sample, reason: str) -> SampleError:
    name = str(image.source)
    if isinstance(image.source, bytes):
        place = next((at for at, other in enumerate(sample.images, 1) if other is image), "?")
        name = f"picture {place}, given as {len(image.source):,} bytes,"
    found = f"{name} cannot be read: {reason}"
    return SampleError(sample.where, found, "Replace it with an 8-bit PNG or JPEG, or drop the row.", sample.id)


def missing(path: Path, sample: Sample) -> SampleError:
    """What to say of a file that is not there; names the nearest, which upstream would take without a word."""
    others = [path.with_suffix(suffix) for suffix in SUFFIXES]
    near = next((other.name for other in others if other.is_file()), None)
    remedy = f"Did you mean {near}? " if near else "A path in a row starts at the folder of the data file. "
    return SampleError(sample.where, f"no such file: {path}", remedy + "Mend the path in the row.", sample.id)
