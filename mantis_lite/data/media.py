"""Pictures: their size from the header alone, and their pixels as they are to be seen. Both agree on the size."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple
from zipfile import BadZipFile

import numpy as np
import PIL.Image
from PIL.ExifTags import Base
from PIL.Image import Transpose

from ..errors import SampleError
from .sample import Frame, Image, Sample
from .zipped import Zipped

RULES = 2
"""To be raised when this file makes another size or other pixels of a picture: what is kept from before is not used."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened, by content and not by name. Pillow's other readers are of rare formats, and some run other programs.

An MPO, as some phones write, is a JPEG with more pictures behind it; Pillow opens it as JPEG, and the first is taken.
"""

MAX_PIXELS = 50_000_000
MAX_ASPECT = 200
"""How many times as long as the other a side may be."""

MIN_SIDE = 16  # px: upstream enlarges smaller pictures, for the vision processors' sake
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")

UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What to do with a picture by its EXIF orientation; from 5 on the sides change places."""

JPEG_BEGIN, LONG_JPEG_BEGIN = 4 << 10, 256 << 10
"""Bytes that are read of a JPEG to find its size: more, where a small picture of itself or colours come first."""

SEGMENT, FRAME = struct.Struct(">BBH"), struct.Struct(">HH")
"""What a part of a JPEG begins with: a mark, its kind, its length; and a picture's height and width."""

BROKEN = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error),
    BadZipFile,
)
"""What Pillow raises of a file that is broken, by its format and by where."""


class Header(NamedTuple):
    """A picture's (width, height) in pixels as `open_image` returns it, and whether more pictures stand behind it."""

    size: tuple[int, int]
    more: bool


def header(image: Image, sample: Sample, max_size: int | None = None) -> Header:
    """What the header says of a picture; raises SampleError."""
    if isinstance(image, Frame):
        return Header(fitted(image.size, max_size), False)
    if not isinstance(image.source, bytes) and (found := _jpeg_size(image.source)):
        return Header(fitted(found, max_size), False)
    with opened(image, sample) as picture:
        more = getattr(picture, "is_animated", False) and picture.format != "MPO"
        return Header(fitted(upright(picture.size, orientation_of(picture)), max_size), more)


def stream(source: Path | bytes | Zipped) -> IO[bytes]:
    """The bytes of a picture's file. Raises OSError."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return source.open() if isinstance(source, Zipped) else source.open("rb")


def file_now(source: Path | Zipped) -> tuple[Path | Zipped, int, int]:
    """What tells a picture's file from every other, and from itself once changed: its size and time. Raises OSError."""
    found = os.stat(source.archive if isinstance(source, Zipped) else source)
    return source, found.st_size, found.st_mtime_ns


def size(image: Image, sample: Sample, max_size: int | None = None) -> tuple[int, int]:
    """The (width, height) in pixels that `open_image` will return, from the header; raises SampleError."""
    return header(image, sample, max_size).size


def open_image(image: Image, sample: Sample, max_size: int | None = None) -> PIL.Image.Image:
    """Decode a picture to RGB, its longest side at most `max_size` pixels; raises SampleError.

    It is turned upright as its EXIF says, seen on white where it is transparent, 16 bits become 8, and of several
    pictures the first is taken. As upstream a shorter side below 16 px is enlarged to 16, whatever `max_size`.
    """
    with opened(image, sample) as picture:
        return fit(decoded(picture), max_size)


def decoded(picture: PIL.Image.Image) -> PIL.Image.Image:
    """What is seen of an opened picture: RGB, upright, in its own size. Raises one of `BROKEN`."""
    orientation = orientation_of(picture)
    expected = upright(picture.size, orientation)
    seen = _rgb(picture)
    if orientation in UPRIGHT:
        seen = seen.transpose(UPRIGHT[orientation])
    if seen.size != expected:
        raise ValueError(
            f"its header says {expected[0]} x {expected[1]} pixels, and it has {seen.width} x {seen.height}"
        )
    return seen


def fit(pixels: PIL.Image.Image, max_size: int | None) -> PIL.Image.Image:
    """A picture scaled to what `size` says of it."""
    wanted = fitted(pixels.size, max_size)
    return pixels if pixels.size == wanted else pixels.resize(wanted)


def unfit(found: tuple[int, int]) -> str | None:
    """What to say of a size in pixels that no picture may have, or None."""
    width, height = found
    named = f"{width:,} x {height:,} pixels"
    if width * height > MAX_PIXELS:
        return f"too large: {named}, which are more than {MAX_PIXELS:,}"
    if max(found) > MAX_ASPECT * min(found):
        return f"{named}: one side is more than {MAX_ASPECT} times the other"
    return None


def _rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode.startswith("I"):
        return PIL.Image.fromarray(_eight_bits(picture)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = PIL.Image.new("RGB", picture.size, "white")
    layer = picture.convert("RGBA")
    seen.paste(layer, mask=layer)
    return seen


def _eight_bits(picture: PIL.Image.Image) -> np.ndarray:
    """Greys of 16 bits (H, W) as 8, white where a PNG's are transparent; raises ValueError."""
    values = np.asarray(picture).astype(np.int32)
    least, most = int(values.min()), int(values.max())
    if picture.mode == "I" and (least < 0 or not 255 < most < 1 << 16):
        raise ValueError(f"its greys are 32-bit numbers from {least:,} to {most:,}, and 16 bits are 0 to 65,535")
    scaled = ((values + 128) // 257).astype(np.uint8)  # 65,535 / 257 = 255
    if "transparency" in picture.info:
        scaled[values == picture.info["transparency"]] = 255
    return scaled


def upright(found: tuple[int, int], orientation: int) -> tuple[int, int]:
    """A size as it is when turned by this EXIF orientation, or turned back."""
    return found if orientation < 5 else (found[1], found[0])


def orientation_of(picture: PIL.Image.Image) -> int:
    """How an opened picture is to be turned, a key of `UPRIGHT` or 1."""
    # Pillow turns a TIFF itself, its size as well. Only EXIF counts, as in browsers: not what XMP may say besides.
    return 1 if picture.format == "TIFF" else _orientation(picture.info.get("exif", b""))


def _orientation(exif: bytes) -> int:
    """How a picture is to be turned, from 1 to 8: the entry 0x0112 of the first list in its EXIF, else 1."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = ">" if exif.startswith(b"MM") else "<"
    try:
        (begin,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, begin)
        for at in range(begin + 2, begin + 2 + 12 * count, 12):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", exif, at)
            if tag == Base.Orientation:
                return value if (kind, number) == (3, 1) and value in UPRIGHT else 1
    except struct.error:  # cut short: nothing a picture would be refused for
        pass
    return 1


def _jpeg_size(source: Path | Zipped) -> tuple[int, int] | None:
    """A JPEG's size upright, in a fraction of Pillow's time; None where Pillow must look, or say what is wrong."""
    if not str(source).lower().endswith((".jpg", ".jpeg")):
        return None
    try:
        begin = _begin(source, JPEG_BEGIN)
        try:
            found = _jpeg_header(begin)
        except struct.error:
            found = _jpeg_header(_begin(source, LONG_JPEG_BEGIN)) if len(begin) == JPEG_BEGIN else None
    except (OSError, EOFError, struct.error, zlib.error, BadZipFile):
        return None
    return None if found is None or not all(found) or unfit(found) else found


def _begin(source: Path | Zipped, most: int) -> bytes:
    """At most so many bytes that a picture's file begins with. Raises OSError, as of a folder."""
    if isinstance(source, Zipped):
        with source.open() as file:
            return file.read(most)
    file_number = os.open(source, os.O_RDONLY | os.O_NONBLOCK)  # to open a pipe is else to wait for who writes to it
    try:
        return os.read(file_number, most)
    finally:
        os.close(file_number)


def _jpeg_header(begin: bytes) -> tuple[int, int] | None:
    """The size upright from the segments in front of the pixels; None where they are not as in every JPEG.

    Raises struct.error where the pixels are further away.
    """
    if not begin.startswith(b"\xff\xd8"):
        return None
    frames, exifs = [], []
    at = 2
    while True:
        mark, kind, length = SEGMENT.unpack_from(begin, at)
        if mark != 0xFF or length < 2:
            return None
        if kind == 0xDA:  # the pixels
            break
        if kind & 0xF0 == 0xC0 and kind not in (0xC4, 0xC8, 0xCC):
            frames.append(FRAME.unpack_from(begin[at + 5 : at + 2 + length]))
        elif kind == 0xE1 and begin.startswith(b"Exif\0\0", at + 4):
            exifs.append(begin[at + 4 : at + 2 + length])
        at += 2 + length
    if len(frames) != 1 or len(exifs) > 1:
        return None
    height, width = frames[0]
    return upright((width, height), _orientation(exifs[0]) if exifs else 1)


def fitted(found: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    """The size to which a picture of this size is scaled."""
    scale = min(1.0, max_size / max(found)) if max_size else 1.0
    if int(min(found) * scale) < MIN_SIDE:
        scale = MIN_SIDE / min(found)
    return int(found[0] * scale), int(found[1] * scale)  # rounded down, as upstream rounds


@contextmanager
def opened(image: Image, sample: Sample) -> Iterator[PIL.Image.Image]:
    """Open the header; a failure here or in the body, where pixels are read, becomes a SampleError."""
    source = image.source
    try:
        if isinstance(source, Path) and source.is_fifo():
            raise OSError("it is a pipe, not a file")  # to open it is to wait for who writes to it
        with stream(source) as file, PIL.Image.open(file, formats=FORMATS) as picture:
            if odd := unfit(picture.size):
                raise _unreadable(image, sample, odd, "Scale it down or crop it")
            _refuse_unknown_white(picture)
            yield picture
    except SampleError:
        raise
    except FileNotFoundError:
        assert not isinstance(source, bytes)
        raise missing(source.archive if isinstance(source, Zipped) else source, sample) from None
    except PIL.UnidentifiedImageError:
        raise _unreadable(image, sample, "not a JPEG, PNG, WebP, GIF, BMP or TIFF picture") from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise _unreadable(image, sample, f"too large: {error}", "Scale it down or crop it") from None
    except BROKEN as error:
        raise _unreadable(image, sample, getattr(error, "strerror", None) or str(error)) from None


def _refuse_unknown_white(picture: PIL.Image.Image) -> None:
    """Raise ValueError for greys of which the header does not say how bright they are, or not as Pillow reads them."""
    if picture.mode.startswith("F"):
        raise ValueError("its greys are floating-point numbers (mode F), and nothing says which of them is white")
    tags = getattr(picture, "tag_v2", {})
    if picture.mode.startswith("I;16") and tags:
        if (bits := tags[Base.BitsPerSample][0]) != 16:
            raise ValueError(f"its greys have {bits} bits")
        if tags[Base.PhotometricInterpretation] == 0:
            raise ValueError("its greys have 16 bits, with zero for white")


def _unreadable(
    image: Image, sample: Sample, reason: str, remedy: str = "Replace it with an 8-bit PNG or JPEG"
) -> SampleError:
    name = str(image.source)
    if isinstance(image.source, bytes):
        place = next((at for at, other in enumerate(sample.images, 1) if other is image), "?")
        name = f"picture {place}, given as {len(image.source):,} bytes,"
    return SampleError(sample.where, f"{name} cannot be read: {reason}", f"{remedy}, or drop the row.", sample.id)


def missing(path: Path, sample: Sample) -> SampleError:
    """What to say of a file that is not there; names the nearest, which upstream would take without a word."""
    others = [path.with_suffix(suffix) for suffix in SUFFIXES]
    near = next((other.name for other in others if other.is_file()), None)
    remedy = f"Did you mean {near}? " if near else "A path in a row starts at the folder of the data file. "
    return SampleError(sample.where, f"no such file: {path}", remedy + "Mend the path in the row.", sample.id)
