"""Bad and odd pictures and clips, made from nothing, in rows that use them, with what is to be said of each.

To look at them: `python tests/corpus.py FOLDER`.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from clips_made import make, make_sound

ORIENTATION = 0x0112
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20


@dataclass(frozen=True)
class Case:
    """A row as in train.json, and what comes of it: nothing wrong, or an error with these words in it.

    `late` says that only decoding finds it: the header is sound. A `notice` has these words in it.
    """

    name: str
    row: dict[str, Any]
    expected: str | None = None
    late: bool = False
    notice: str | None = None


def write(folder: Path) -> list[Case]:
    """Make all files below a folder, where the rows' paths start; they suit task=video, which takes pictures too."""
    return [*write_pictures(folder), *write_clips(folder)]


def write_pictures(folder: Path) -> list[Case]:
    (folder / "pictures").mkdir(parents=True)
    return [*_sound_pictures(folder), *_bad_pictures(folder)]


def write_clips(folder: Path) -> list[Case]:
    (folder / "clips").mkdir(parents=True)
    return [*_sound_clips(folder), *_bad_clips(folder)]


def write_rows(cases: list[Case], file: Path) -> None:
    """The cases' rows as a data file."""
    file.write_text(json.dumps([case.row for case in cases], indent=1))


def noise(width: int = 20, height: int = 30, channels: int = 3) -> np.ndarray:
    """Pixels of no pattern, so that a picture turned or cut differs from the whole everywhere."""
    return np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(picture: PIL.Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def turned(orientation: int) -> PIL.Image.Exif:
    """EXIF that says how to turn a picture."""
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has this size, with the pixels of another."""
    return png(noise().tobytes(), width, height, 8, 2)


def png(pixels: bytes, width: int, height: int, bits: int, kind: int) -> bytes:
    """A PNG of `kind` 0 for greys or 2 for colours, its numbers big endian."""
    row = len(pixels) // max(1, height)
    rows = b"".join(b"\0" + pixels[at * row : (at + 1) * row] for at in range(height if row else 0))
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    packed = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(pixels: bytes, width: int, height: int, bits: int, white: int = 1, kind: int = 1) -> bytes:
    """A grey TIFF as its tags say: `white` is 0 where zero is white; `kind` 1 is unsigned, 2 signed, 3 float."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 0, 277: 1, 278: height, 279: len(pixels)}
    tags[339] = kind
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + pixels


def _picture(folder: Path, name: str, content: bytes | None, *said: Any, **more: Any) -> Case:
    """A row with one picture; None for content is a file that is not there."""
    if content is not None:
        (folder / "pictures" / name).write_bytes(content)
    row = {"id": name, "images": [f"pictures/{name}"], "conversation": _turns("<image>")}
    return Case(name, row, *said, **more)


def _turns(mark: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"{mark} What is this?"},
        {"role": "assistant", "content": "Something odd."},
    ]


def _sound_pictures(folder: Path) -> Iterator[Case]:
    rgb, rgba = PIL.Image.fromarray(noise()), PIL.Image.fromarray(noise(channels=4))
    for orientation in range(1, 9):
        for suffix, kind, how in (("jpg", "JPEG", {}), ("png", "PNG", {}), ("webp", "WEBP", {"lossless": True})):
            content = saved(rgb, kind, exif=turned(orientation), **how)
            yield _picture(folder, f"turned-{orientation}.{suffix}", content)
        content = saved(rgb, "TIFF", tiffinfo={ORIENTATION: orientation})
        yield _picture(folder, f"turned-{orientation}.tif", content)
    for mode in ("1", "L", "P"):
        yield _picture(folder, f"{mode}.png", saved(rgb.convert(mode)))
    for mode in ("RGBA", "LA"):
        yield _picture(folder, f"{mode}.png", saved(rgba.convert(mode)))
    yield _picture(folder, "P-transparent.png", saved(rgb.convert("P"), transparency=3))
    yield _picture(folder, "drawing.png", saved(drawing()))
    yield _picture(folder, "CMYK.jpg", saved(rgb.convert("CMYK"), "JPEG"))
    yield _picture(folder, "CMYK.tif", saved(rgb.convert("CMYK"), "TIFF"))
    yield _picture(folder, "deep.png", saved(deep()))
    yield _picture(folder, "deep.tif", saved(deep(), "TIFF"))
    yield _picture(folder, "deep-big-endian.tif", saved(deep(">u2"), "TIFF"))
    yield _picture(
        folder, "deep-in-32-bits.tif", saved(PIL.Image.fromarray(np.asarray(deep()).astype(np.int32)), "TIFF")
    )
    yield _picture(folder, "one-pixel.bmp", saved(rgb.crop((0, 0, 1, 1)), "BMP"))
    yield _picture(folder, "phone.jpg", saved(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]))
    several = {"save_all": True, "append_images": [rgb.rotate(180)]}
    for suffix, kind in (("gif", "GIF"), ("webp", "WEBP"), ("png", "PNG"), ("tif", "TIFF")):
        yield _picture(folder, f"several.{suffix}", saved(rgb, kind, **several), notice="the first was taken")


def drawing() -> PIL.Image.Image:
    """A black square on nothing; where there is nothing, the colour is black as well."""
    pixels = np.zeros((30, 20, 4), dtype=np.uint8)
    pixels[10:20, 5:15, 3] = 255
    return PIL.Image.fromarray(pixels)


def deep(kind: str = "<u2") -> PIL.Image.Image:
    """Every 64th of the 65,536 greys of 16 bits."""
    return PIL.Image.fromarray((np.arange(1024) * 64).reshape(32, 32).astype(kind))


def _bad_pictures(folder: Path) -> Iterator[Case]:
    rgb = PIL.Image.fromarray(noise(300, 200))
    floats = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    yield _picture(folder, "float.tif", saved(PIL.Image.fromarray(floats), "TIFF"), "mode F")
    wide = PIL.Image.fromarray(np.full((20, 20), 70_000, np.int32))
    yield _picture(folder, "32-bits.tif", saved(wide, "TIFF"), "numbers from 70,000 to 70,000", late=True)
    bytes_of = PIL.Image.fromarray(np.full((20, 20), 200, np.int32))
    yield _picture(folder, "8-bits-in-32.tif", saved(bytes_of, "TIFF"), "numbers from 200 to 200", late=True)
    yield _picture(folder, "12-bits.tif", tiff(bytes(600), 20, 20, 12), "12 bits")
    yield _picture(folder, "white-is-0.tif", tiff(bytes(800), 20, 20, 16, white=0), "zero for white")
    yield _picture(folder, "bomb.png", saved(PIL.Image.new("1", (13_300, 13_300))), "13,300 x 13,300 pixels")
    yield _picture(folder, "larger-bomb.png", png_header(60_000, 60_000), "too large")
    yield _picture(folder, "thread.png", saved(PIL.Image.new("L", (60_000, 1))), "60,000 x 1 pixels")
    yield _picture(folder, "no-width.png", png_header(0, 30), "cannot be read")
    yield _picture(folder, "cut.jpg", saved(rgb, "JPEG")[:20_000], "truncated", late=True)
    yield _picture(folder, "cut.png", saved(rgb)[:90_000], "truncated", late=True)
    yield _picture(folder, "cut.webp", saved(rgb, "WEBP", lossless=True)[:60_000], "could not create decoder object")
    yield _picture(folder, "cut.gif", saved(rgb, "GIF")[:20_000], "truncated", late=True)
    yield _picture(folder, "empty.jpg", b"", "not a JPEG")
    yield _picture(folder, "page.jpg", HTML, "not a JPEG")
    yield _picture(folder, "other.ppm", saved(rgb, "PPM"), "not a JPEG")
    yield _picture(folder, "icon.png", saved(rgb, "ICO"), "not a JPEG")
    late_xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><x tiff:Orientation="6"/></x:xmpmeta>'
    yield _picture(folder, "xmp.tif", saved(rgb, "TIFF", tiffinfo={700: late_xmp}), "its header says", late=True)
    yield _picture(folder, "missing.jpg", None, "no such file")


def _clip(name: str, *said: Any, **more: Any) -> Case:
    """A row with the clip of this name."""
    return Case(name, {"id": name, "video": f"clips/{name}", "conversation": _turns("<video>")}, *said, **more)


def _sound_clips(folder: Path) -> Iterator[Case]:
    place = folder / "clips"
    uneven = [0, 40, 50, 400, 1000, 1010, *range(2000, 2800, 33)]
    make(place / "uneven.mp4", frames=len(uneven), time_base=Fraction(1, 1000), stamps=uneven)
    make(place / "turned.mp4", rotation=90)
    make(place / "no-duration.mkv", muxer={"live": "1"})
    make(place / "whole.mp4").rename(place / "other-kind.avi")
    yield from (_clip(name) for name in ("uneven.mp4", "turned.mp4", "no-duration.mkv", "other-kind.avi"))


def _bad_clips(folder: Path) -> Iterator[Case]:
    place = folder / "clips"
    make(place / "no-frames.mp4", frames=0)
    yield _clip("no-frames.mp4", "is empty (0 frames)")
    make_sound(place / "sound.mp4")
    yield _clip("sound.mp4", "has no pictures, only sound")
    whole = make(place / "cut.mp4", frames=60, muxer={"movflags": "faststart"}).read_bytes()
    (place / "cut.mp4").write_bytes(whole[: len(whole) * 7 // 10])
    yield _clip("cut.mp4", "ends after", late=True)
    (place / "ten-hours.flv").write_bytes(ten_hours(make(place / "ten-hours.flv").read_bytes()))
    yield _clip("ten-hours.flv", "ends after 1.2 s of 36000", late=True)
    make(place / "huge.mkv", "mjpeg", frames=1, size=(8_000, 6_400))
    yield _clip("huge.mkv", "more than 50,000,000 pixels")
    make(place / "thread.mkv", "mjpeg", frames=1, size=(6_400, 16))
    yield _clip("thread.mkv", "6,400 x 16 pixels")
    (place / "no-index.mp4").write_bytes(make(place / "no-index.mp4").read_bytes()[:2_000])
    yield _clip("no-index.mp4", "not a video, or damaged")
    for name, content in (("empty.mp4", b""), ("page.mp4", HTML), ("noise.mp4", noise(200, 300).tobytes())):
        (place / name).write_bytes(content)
        yield _clip(name, "not a video, or damaged")
    yield _clip("missing.mp4", "no such file")


def ten_hours(flv: bytes) -> bytes:
    """The clip with a header that says that it lasts 10 hours."""
    name = b"\0\x08duration\0"
    at = flv.index(name) + len(name)
    return flv[:at] + struct.pack(">d", 36_000) + flv[at + 8 :]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_rows(write(root), root / "train.json")
