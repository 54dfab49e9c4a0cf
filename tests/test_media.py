"""Sizes come from headers alone and agree with the pixels; a picture that cannot be read says so."""

import hashlib
import io
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import corpus
import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pytest
from corpus import deep, drawing, noise, png_header, saved, turned
from helpers import SHARED, by_size, chat, golden_pictures, recipe, write_rows
from hypothesis import given
from hypothesis import strategies as st

from mantis_lite.data.media import MAX_PIXELS, header, open_image, size
from mantis_lite.data.prepare import prepare
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.errors import SampleError

GOLDEN = SHARED / "golden"


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


def pixels_of(found: bytes | Path) -> np.ndarray:
    picture = image_of(found)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_ordinary_colours_are_the_files_own():
    rgb = noise()
    assert np.array_equal(pixels_of(saved(PIL.Image.fromarray(rgb))), rgb)
    assert np.array_equal(pixels_of(saved(PIL.Image.fromarray(rgb), "BMP")), rgb)
    content = saved(PIL.Image.fromarray(rgb), "JPEG")
    assert np.array_equal(pixels_of(content), np.asarray(PIL.Image.open(io.BytesIO(content))))


def test_greys_are_equal_in_all_colours():
    grey = noise()[:, :, 0]
    assert np.array_equal(pixels_of(saved(PIL.Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, 2))
    bits = grey > 127
    expected = np.repeat(bits[:, :, None] * np.uint8(255), 3, 2)
    assert np.array_equal(pixels_of(saved(PIL.Image.fromarray(bits))), expected)


PALETTE = np.array([(10, 20, 30), (250, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)


def palette(kind: str, **settings) -> tuple[np.ndarray, bytes]:
    places = noise()[:, :, 0] % 4
    picture = PIL.Image.fromarray(places, "P")
    picture.putpalette(PALETTE.tobytes())
    return places, saved(picture, kind, **settings)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_a_palettes_colours(kind):
    places, content = palette(kind)
    assert np.array_equal(pixels_of(content), PALETTE[places])


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palettes_transparent_colour_is_white(kind):
    places, content = palette(kind, transparency=2)
    colours = PALETTE.copy()
    colours[2] = 255
    assert np.array_equal(pixels_of(content), colours[places])


def test_a_palette_that_is_half_transparent():
    places, content = palette("PNG", transparency=bytes([255, 128, 0, 255]))
    colours = PALETTE.copy()
    colours[1], colours[2] = (252, 127, 127), 255
    assert np.abs(pixels_of(content).astype(int) - colours[places]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_stands_on_white(mode, kind):
    pixels = noise(32, 16, 4)
    pixels[:4, :, 3], pixels[4:8, :, 3] = 255, 0
    if mode == "LA":
        pixels[:, :, 1] = pixels[:, :, 2] = pixels[:, :, 0]
    found = pixels_of(saved(PIL.Image.fromarray(pixels).convert(mode), kind, lossless=True, exact=True)).astype(int)
    colours, alpha = pixels[:, :, :3].astype(float), pixels[:, :, 3:] / 255
    assert np.abs(found - (colours * alpha + 255 * (1 - alpha))).max() <= 1
    assert np.array_equal(found[:4], pixels[:4, :, :3])  # as upstream, which drops the transparency
    assert (found[4:8] == 255).all()


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (0, 0, 0)), ("L", 0), ("1", 0)])
def test_a_colour_named_transparent_is_white(mode, colour):
    pixels = np.zeros((16, 16, 3), np.uint8)
    assert (pixels_of(saved(PIL.Image.fromarray(pixels).convert(mode), transparency=colour)) == 255).all()


def test_a_drawing_on_nothing_is_seen():
    """Its colours without the transparency are black all over."""
    found = pixels_of(saved(drawing()))
    assert (found[10:20, 5:15] == 0).all()
    assert found.mean() == pytest.approx(255 * 5 / 6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_become_eight(kind, order):
    values = np.asarray(deep()).astype(int)
    found = pixels_of(saved(deep(order), kind))
    assert np.array_equal(found, np.repeat(np.round(values / 257)[:, :, None], 3, 2))
    assert len(np.unique(found)) >= 200


def test_sixteen_bits_in_thirty_two():
    content = saved(PIL.Image.fromarray(np.asarray(deep()).astype(np.int32)), "TIFF")
    assert PIL.Image.open(io.BytesIO(content)).mode == "I"
    assert np.array_equal(pixels_of(content), pixels_of(saved(deep())))


def test_a_deep_grey_named_transparent_is_white():
    found = pixels_of(saved(deep(), transparency=640))
    expected = pixels_of(saved(deep())).copy()
    expected[0, 10] = 255
    assert np.array_equal(found, expected)


def test_sixteen_bits_a_colour_become_eight():
    """A PNG of 16-bit colours, made by hand: Pillow writes none."""
    values = np.random.default_rng(0).integers(0, 1 << 16, (16, 16, 3)).astype(">u2")
    found = pixels_of(corpus.png(values.tobytes(), 16, 16, 16, 2))
    assert np.abs(found - values / 257).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_ink_becomes_light(kind):
    """An Adobe JPEG holds ink upside down."""
    light = np.repeat(np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)], np.uint8), 16, 0)
    light = np.repeat(light[None], 16, 0)
    content = saved(PIL.Image.fromarray(light).convert("CMYK"), kind, quality=100)
    assert PIL.Image.open(io.BytesIO(content)).mode == "CMYK"
    assert kind == "TIFF" or b"\xff\xee\x00\x0eAdobe" in content
    assert np.abs(pixels_of(content).astype(int) - light).max() <= 4


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""What EXIF's orientations say, by where the first row and column of a file belong."""


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_pictures_are_seen_upright(suffix, orientation, tmp_path):
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    how = {"tiffinfo": {corpus.ORIENTATION: orientation}} if kind == "TIFF" else {"exif": turned(orientation)}
    picture = PIL.Image.fromarray(noise())
    content, plain = saved(picture, kind, lossless=True, **how), saved(picture, kind, lossless=True)
    expected = TURNED[orientation](pixels_of(plain))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    for found in (path, content):
        assert np.array_equal(pixels_of(found), expected)
        assert size(Image(found), sample_of(Image(found))) == expected.shape[1::-1]
    other = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB")
    assert np.array_equal(np.asarray(other), expected)


def test_a_deep_picture_is_turned_too():
    content = saved(deep(), "TIFF", tiffinfo={corpus.ORIENTATION: 6})
    assert np.array_equal(pixels_of(content), np.rot90(pixels_of(saved(deep())), -1))


def segment(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(content) + 2) + content


@pytest.fixture(scope="module")
def a_jpeg(tmp_path_factory):
    return tmp_path_factory.mktemp("jpeg") / "a.jpg"


@given(data=st.data())
def test_a_jpegs_size_is_the_same_without_pillow(a_jpeg, data):
    """With EXIF that is cut short, or changed, or there twice, or with other segments, or fill between them."""
    exif = bytearray(turned(data.draw(st.integers(0, 9))).tobytes())
    for at, byte in data.draw(st.lists(st.tuples(st.integers(6, len(exif) - 1), st.integers(0, 255)), max_size=3)):
        exif[at] = byte
    parts = [
        segment(0xE1, bytes(exif[: data.draw(st.integers(0, len(exif)))])),
        segment(0xE1, turned(6).tobytes()),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>"),
        segment(0xFE, b"a comment"),
        segment(0xFE, bytes(5_000)),
        segment(0xC0, b"\x08"),
        b"\xff\xff",
    ]
    start, rest = encoded(fmt="JPEG")[:2], encoded(fmt="JPEG")[2:]
    content = start + b"".join(data.draw(st.lists(st.sampled_from(parts), max_size=3))) + rest
    a_jpeg.write_bytes(content)
    try:
        expected = image_of(content).size
    except SampleError as error:
        with pytest.raises(SampleError, match="cannot be read") as found:
            size(Image(a_jpeg), sample_of())
        assert found.value.found.partition(" cannot")[2] == error.found.partition(" cannot")[2]
    else:
        assert size(Image(a_jpeg), sample_of()) == size(Image(content), sample_of()) == expected


@pytest.mark.parametrize("comments", [0, 1, 3])
def test_a_jpegs_header_alone_says_its_size(comments, tmp_path):
    """However far behind the file's beginning it stands."""
    content = saved(PIL.Image.fromarray(noise(200, 300)), "JPEG", exif=turned(6))
    head, tail = content[:2], content[2 : content.index(b"\xff\xda") + 4]
    (tmp_path / "a.jpg").write_bytes(head + comments * segment(0xFE, bytes(65_000)) + tail)
    assert size(Image(tmp_path / "a.jpg"), sample_of()) == (300, 200)


def test_a_jpegs_size_is_found_behind_much_else(tmp_path):
    content = saved(PIL.Image.fromarray(noise(200, 300)), "JPEG", exif=turned(6))
    (tmp_path / "a.jpg").write_bytes(content[:2] + 5 * segment(0xFE, bytes(65_000)) + content[2:])
    assert size(Image(tmp_path / "a.jpg"), sample_of()) == (300, 200)


def test_a_tiff_turned_by_xmp_alone_is_refused():
    """Pillow turns its pixels, and not its size."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><x tiff:Orientation="6"/></x:xmpmeta>'
    content = saved(PIL.Image.fromarray(noise()), "TIFF", tiffinfo={700: xmp})
    with pytest.raises(SampleError, match="its header says 20 x 30 pixels, and it has 30 x 20"):
        image_of(content)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_pictures_is_taken_and_told(kind):
    first, second = (PIL.Image.fromarray(noise(width)).resize((20, 30)) for width in (20, 21))
    several = saved(first, kind, save_all=True, append_images=[second], lossless=True)
    alone = saved(first, kind, lossless=True)
    assert np.array_equal(pixels_of(several), pixels_of(alone))
    assert header(Image(several), sample_of()) == ((20, 30), True)
    assert header(Image(alone), sample_of()) == ((20, 30), False)


def test_a_row_with_the_first_of_several_pictures_is_counted(tmp_path):
    """Also at a second start, which opens no picture."""
    one = PIL.Image.fromarray(noise())
    several = saved(one, "GIF", save_all=True, append_images=[one.rotate(180)])
    rows = [chat("Hi", "Ho", images=(0,)), chat("Hi", "Ho"), chat("Hi", "Ho")]
    rows[1]["images"], rows[2]["images"] = [{"bytes": several}] * 3, [{"bytes": several}]
    settings = recipe(data={"sources": write_rows(tmp_path / "rows.jsonl", rows)})
    for _ in range(2):
        prepared = prepare(settings.data, settings.packing, by_size())
        assert prepared.notices == {"a picture has more behind it, as an animation has: only the first was taken": 2}
        assert prepared.train.images.tolist() == [1, 3, 1]


def test_lengths_found_under_other_rules_are_not_used(monkeypatch):
    before = by_size().fingerprint
    monkeypatch.setattr("mantis_lite.data.media.RULES", 0)
    assert by_size().fingerprint != before


def test_a_phones_jpeg_with_more_behind_it_is_a_jpeg():
    picture = PIL.Image.fromarray(noise())
    content = saved(picture, "MPO", save_all=True, append_images=[picture.rotate(180)])
    assert PIL.Image.open(io.BytesIO(content)).format == "MPO"
    assert np.array_equal(pixels_of(content), pixels_of(saved(picture, "JPEG")))
    assert header(Image(content), sample_of()) == ((20, 30), False)


def test_size_reads_no_pixels():
    image = Image(encoded(200, 300)[:60])
    assert size(image, sample_of(image)) == (200, 300)


def broken_chunk() -> bytes:
    head, data, rest = encoded(200, 300).rpartition(b"IDAT")
    return head + bytes(len(data)) + rest


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (b"not a picture", "not a JPEG, PNG, WebP, GIF, BMP or TIFF picture"),
        (b"", "not a JPEG, PNG, WebP, GIF, BMP or TIFF picture"),
        (encoded()[:20], "Truncated File Read"),
        (encoded(fmt="JPEG")[:900], "image file is truncated"),
        (encoded(200, 300)[:9000], "truncated"),
        (broken_chunk(), "broken PNG file"),
    ],
    ids=["text", "empty", "header", "jpeg", "png", "chunk"],
)
def test_unreadable_bytes_are_named(found, reason):
    other, image = Image(encoded()), Image(found)
    named = rf'^train.json:7 \(id "a"\): picture 2, given as [\d,]+ bytes, cannot be read: .*({reason})'
    with pytest.raises(SampleError, match=named) as error:
        open_image(image, sample_of(other, image))
    assert "Replace it with an 8-bit PNG or JPEG" in str(error.value)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The corpus' folder, and its cases with a picture."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, corpus.write_pictures(folder)


def test_the_corpus_says_what_is_expected_of_it(written):
    """Each bad picture is named with its row, by the header where that can tell; no other is."""
    folder, cases = written
    for case in cases:
        image = Image(folder / case.row["images"][0])
        sample = Sample("train.json:7", case.name, (Turn("user", (image,)),))
        if case.expected is None:
            assert open_image(image, sample).size == size(image, sample), case
            assert header(image, sample).more == bool(case.notice), case
            continue
        if case.late:
            size(image, sample)
        with pytest.raises(SampleError) as error:
            (open_image if case.late else size)(image, sample)
        said = str(error.value)
        assert said.startswith(f'train.json:7 (id "{case.name}"): '), case
        assert str(image.source) in said and case.expected in said, (case, said)
        assert "\n  " in said and said.endswith("row."), said


def sized_jpeg(width: int, height: int) -> bytes:
    """A JPEG that says it has this size."""
    content = bytearray(saved(PIL.Image.fromarray(noise()), "JPEG"))
    struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, height, width)
    return bytes(content)


@pytest.mark.parametrize(
    ("found", "fits"),
    [((10_000, 5_000), True), ((10_001, 5_000), False), ((2_000, 10), True), ((2_001, 10), False), ((1, 200), True)],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_largest_and_the_thinnest(found, fits, suffix, tmp_path):
    """By the header: none of them is decoded here."""
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        path.write_bytes(png_header(*found))
    else:
        path.write_bytes(sized_jpeg(*found))
    if fits:
        assert max(size(Image(path), sample_of())) >= max(found)
        return
    said = "more than 50,000,000" if found[1] == 5_000 else "one side is more than 200 times the other"
    with pytest.raises(SampleError, match=rf"{found[0]:,} x {found[1]:,} pixels.*{said}\n  Scale it down or crop it"):
        size(Image(path), sample_of())


@pytest.mark.parametrize("found", [(0, 0), (0, 30), (20, 0)], ids=str)
def test_a_picture_without_a_pixel(found, tmp_path):
    (tmp_path / "a.jpg").write_bytes(sized_jpeg(*found))
    for source in (tmp_path / "a.jpg", sized_jpeg(*found), png_header(*found)):
        with pytest.raises(SampleError, match="cannot be read: not a JPEG"):
            size(Image(source), sample_of())


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    PIL.Image.new("1", (13_300, 13_300)).save(path)
    assert path.stat().st_size < 25_000
    script = (
        "import resource, sys, warnings; from pathlib import Path; import PIL.Image\n"
        "from mantis_lite.data import media; from mantis_lite.data.sample import Image, Sample\n"
        "warnings.simplefilter('ignore'); image = Image(Path(sys.argv[1])); limit = PIL.Image.MAX_IMAGE_PIXELS\n"
        "PIL.Image.init()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for read in (media.size, media.open_image):\n"
        "    try: read(image, Sample('t:1', None, ()))\n"
        "    except ValueError as error: print(error)\n"
        "assert PIL.Image.MAX_IMAGE_PIXELS == limit\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    *said, grown = done.stdout.splitlines()
    assert said.count(said[0]) == 2 and "13,300 x 13,300 pixels" in said[0]
    assert int(grown) < 10_000  # KB; decoded it takes 177,000 and more


def test_pillows_own_settings_are_left_alone():
    import mantis_lite.cli
    import mantis_lite.training.start  # noqa: F401

    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert PIL.Image.MAX_IMAGE_PIXELS == 89_478_485 > MAX_PIXELS


@pytest.mark.filterwarnings("error")
def test_warnings_as_errors_are_the_rows_too():
    with pytest.raises(SampleError, match="too large"):
        size(Image(png_header(13_300, 13_300)), sample_of())


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is broken
def test_nothing_broken_ends_in_another_error(written):
    """Each kind of picture, cut off or with some bytes changed: it is read, or refused as the row's."""
    folder, cases = written
    chance = random.Random(0)
    for case in cases:
        path = folder / case.row["images"][0]
        whole = path.read_bytes() if path.is_file() else b""
        for _ in range(20 if len(whole) < 25_000 else 0):
            content = bytearray(whole[: chance.randrange(len(whole) + 1)] if chance.random() < 0.3 else whole)
            for _ in range(chance.choice([1, 3, 20]) if content else 0):
                content[chance.randrange(min(len(content), chance.choice([60, 300, 1 << 20])))] = chance.randrange(256)
            image = Image(bytes(content))
            try:
                expected = size(image, sample_of(image))
                assert open_image(image, sample_of(image)).size == expected
            except SampleError:
                pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(SampleError, match="it is a pipe, not a file"):
        size(Image(tmp_path / name), sample_of())


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
    files = golden_pictures()
    pictures = [image_of(files[Path(name).name]) for name in recorded["sample"]["images"]]
    processor = transformers.AutoImageProcessor.from_pretrained(GOLDEN / "checkpoints" / key, backend="pil")
    pixels = processor(images=pictures, return_tensors="np")["pixel_values"].astype(np.float32)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == recorded["pixel_values"]["sha256_fp32"]
