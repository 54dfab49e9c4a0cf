"""Sizes come from headers alone and agree with the pixels; a picture that cannot be read says so."""

import hashlib
import io
import json
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mantis_lite.data.media import open_image, size
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.errors import SampleError

GOLDEN = Path(__file__).parents[2] / "shared/golden"


def sample_of(*images: Image) -> Sample:
    return Sample("train.json:7", "a", (Turn("user", images), Turn("assistant", ("x",))))


def encoded(width=20, height=30, mode="RGB", fmt="PNG", **save) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).convert("RGBA" if "A" in mode else "RGB").convert(mode).save(file, fmt, **save)
    return file.getvalue()


def image_of(found: bytes | Path, max_size: int | None = None) -> PIL.Image.Image:
    image = Image(found)
    return open_image(image, sample_of(image), max_size)


@pytest.mark.parametrize(
    ("found", "max_size", "expected"),
    [
        ((20, 30), None, (20, 30)),
        ((40, 9), None, (71, 16)),
        ((9, 40), 1000, (16, 71)),
        ((1, 1), None, (16, 16)),
        ((100, 50), 60, (60, 30)),
        ((50, 100), 100, (50, 100)),
        ((50, 100), 101, (50, 100)),
        ((99, 40), 64, (64, 25)),
        ((200, 20), 50, (160, 16)),
    ],
    ids=str,
)
def test_size_agrees_with_the_pixels(found, max_size, expected):
    image = Image(encoded(*found))
    assert size(image, sample_of(image), max_size) == expected
    assert open_image(image, sample_of(image), max_size).size == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    found = encoded(mode=mode, fmt="TIFF" if mode == "CMYK" else "PNG")
    picture = image_of(found)
    expected = PIL.Image.open(io.BytesIO(found)).convert("RGB")
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_exif_does_not_turn_a_picture(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn right
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(fmt="JPEG", exif=exif))
    assert image_of(path).size == size(Image(path), sample_of(Image(path))) == (20, 30)


def test_size_reads_no_pixels():
    image = Image(encoded(200, 300)[:60])
    assert size(image, sample_of(image)) == (200, 300)


def bomb() -> bytes:
    """A PNG whose header says 60,000 x 60,000."""
    found = bytearray(encoded())
    found[16:24] = (60_000).to_bytes(4) * 2
    found[29:33] = zlib.crc32(found[12:29]).to_bytes(4)
    return bytes(found)


def broken_chunk() -> bytes:
    head, data, rest = encoded(200, 300).rpartition(b"IDAT")
    return head + bytes(len(data)) + rest


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (b"not a picture", "not a picture in a format that Pillow knows"),
        (b"", "not a picture in a format that Pillow knows"),
        (encoded()[:20], "Truncated File Read"),
        (encoded(fmt="JPEG")[:900], "image file is truncated"),
        (encoded(200, 300)[:9000], "truncated"),
        (broken_chunk(), "broken PNG file"),
        (bomb(), "too large: .*3600000000 pixels"),
    ],
    ids=["text", "empty", "header", "jpeg", "png", "chunk", "bomb"],
)
def test_unreadable_bytes_are_named(found, reason):
    other, image = Image(encoded()), Image(found)
    named = rf'^train.json:7 \(id "a"\): picture 2, given as [\d,]+ bytes, cannot be read: .*({reason})'
    with pytest.raises(SampleError, match=named) as error:
        open_image(image, sample_of(other, image))
    assert "Replace it with an 8-bit PNG or JPEG" in str(error.value)


@pytest.mark.parametrize("read", [size, open_image])
def test_sixteen_bits_are_refused(read, tmp_path):
    path = tmp_path / "deep.png"
    PIL.Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16)).save(path)
    with pytest.raises(SampleError, match=rf"{path} cannot be read: more than 8 bits a colour \(mode I;16\)"):
        read(Image(path), sample_of())


@pytest.mark.parametrize("read", [size, open_image])
def test_paths_that_are_no_picture(read, tmp_path):
    (tmp_path / "b.png").write_bytes(encoded())
    with pytest.raises(SampleError, match=f"{tmp_path} cannot be read: Is a directory"):
        read(Image(tmp_path), sample_of())
    with pytest.raises(SampleError, match=f"no such file: {tmp_path}/a.jpg\n  A path in a row starts at"):
        read(Image(tmp_path / "a.jpg"), sample_of())
    with pytest.raises(SampleError, match=r"no such file: .*/b.jpg\n  Did you mean b.png\?"):
        read(Image(tmp_path / "b.jpg"), sample_of())


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden fixtures are not beside the repository")
@pytest.mark.parametrize("case", ["tiny_image", "real0"])
def test_pixels_equal_upstreams(case):
    transformers = pytest.importorskip("transformers")
    key = "mllava_siglip_llama3"
    recorded = json.loads((GOLDEN / f"forward/{key}.json").read_text())["cases"][case]
    with np.load(GOLDEN / "images.npz") as files:
        pictures = [image_of(files[name].tobytes()) for name in recorded["sample"]["images"]]
    processor = transformers.AutoImageProcessor.from_pretrained(GOLDEN / "checkpoints" / key, backend="pil")
    pixels = processor(images=pictures, return_tensors="np")["pixel_values"].astype(np.float32)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == recorded["pixel_values"]["sha256_fp32"]
