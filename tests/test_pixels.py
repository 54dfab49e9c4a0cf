"""Pictures travel as bytes, to the bit what the published processors make of them; media.backend=fast is near."""

import io
import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import SHARED, chat, in_numbers, picture, recipe, train
from test_families import EACH_MEDIA, stock_batch
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from mantis_lite.contract import facts_of, read_contract
from mantis_lite.data.collate import collate
from mantis_lite.data.dataset import pack_dataset
from mantis_lite.data.media import UPRIGHT, open_image
from mantis_lite.data.packs import Packs
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.data.schema import parse
from mantis_lite.data.turbo import REDUCTIONS, Turbo, open_turbo
from mantis_lite.data.vision import all_of_it
from mantis_lite.errors import RecipeError, SampleError
from mantis_lite.memory import bases
from mantis_lite.memory.estimate import walk
from mantis_lite.memory.ledger import BLOCK
from mantis_lite.memory.packs import grids_of
from mantis_lite.memory.step import Machine, Pack
from mantis_lite.models.levels import levels_of, look_up, look_up_patches
from mantis_lite.models.llava import vision as llava_vision
from mantis_lite.models.load import load_model
from mantis_lite.recipe import MediaRecipe
from mantis_lite.trained import open_trained
from mantis_lite.training.resume import FREE, _changes

SIZES = [(84, 84), (28, 28), (64, 48), (37, 91), (200, 31), (29, 200), (97, 113), (16, 17), (301, 299)]
ROW = chat("<image>See this <image>", "It is red", "More?", "No", images=(0, 1))
GOLDEN = SHARED / "golden/checkpoints"
WHERE = Sample("rows:1", None, ())

needs_turbo = pytest.mark.skipif(find_spec("simplejpeg") is None, reason="needs mantis-lite[fast]")


@pytest.fixture(scope="module")
def model_of(checkpoint_of):
    return cache(lambda name: load_model(checkpoint_of(name), recipe()).eval())


def refuse(error: SampleError) -> None:
    raise error


def noise(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(picture(width, width, height)))


def drawn(width: int, height: int) -> PIL.Image.Image:
    """What a photograph is like: smooth, with edges and some grain."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [
        np.sin(7 * x + phase) + np.cos(5 * y * (1 + phase)) + (((x - 0.5) ** 2 + y**2) < 0.2) for phase in range(3)
    ]
    grain = np.random.default_rng(width).normal(0, 2, (height, width, 3))
    return PIL.Image.fromarray((np.stack(waves, -1) * 40 + 110 + grain).clip(0, 255).astype(np.uint8))


def as_jpeg(image: PIL.Image.Image, **settings) -> bytes:
    image.save(file := io.BytesIO(), "JPEG", **({"quality": 92} | settings))
    return file.getvalue()


def stock(processor, image: PIL.Image.Image) -> list[np.ndarray]:
    """What the published processor makes of a picture, in floating point; Fuyu's as it pads it, in one image."""
    kind = type(processor).__name__
    if "Fuyu" in kind:
        return [np.asarray(processor([[image]])["images"][0][0])]
    if "Idefics" in kind or "SmolVLM" in kind:
        return list(processor([[image]], do_pad="Idefics2" not in kind)["pixel_values"][0])
    return list(processor([image], return_tensors="np")["pixel_values"])


def told(folder, family, config, media: dict):
    """The published processor, told of media settings as a plain client's is."""
    return AutoImageProcessor.from_pretrained(
        folder, backend="pil", **family.processor(config, MediaRecipe(**media)).images
    )


def ours(processor, pixels: dict[str, np.ndarray], stock: list[np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    """Our bytes as their levels are looked up, laid out as the processor's numbers."""
    kind, levels = type(processor).__name__, levels_of(processor)
    arrays = [torch.from_numpy(array.copy()) for array in pixels.values() if array.dtype == np.uint8]
    if "Qwen" in kind:
        return list(look_up_patches(arrays[0], levels, -2).numpy())
    if "Fuyu" in kind:
        side, most = processor.patch_size["height"], processor.size
        scale = min(1, most["width"] / size[0], most["height"] / size[1])
        image = look_up_patches(arrays[0], levels, -1).view(-1, -(-int(size[0] * scale) // side), side, side, 3)
        image = image.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
        stock[0] = stock[0][:, : image.shape[1], : image.shape[2]]  # it fills up to the largest size there is
        return [image[:, : stock[0].shape[1], : stock[0].shape[2]].numpy()]
    views = [look_up(array, levels).numpy() for array in arrays]
    return views if "Idefics2" in kind else list(np.concatenate(views))


@pytest.mark.parametrize(("name", "media"), EACH_MEDIA, ids=str)
def test_bytes_are_the_processors_numbers(checkpoint_of, name, media):
    checkpoint = checkpoint_of(name)
    encoder = checkpoint.encoder(recipe(media=media))
    processor = told(checkpoint.folder, checkpoint.family, checkpoint.config, media)
    for size in SIZES:
        image = noise(*size)
        if encoder.max_image_size:
            image = open_image(Image(picture(size[0], *size)), WHERE, encoder.max_image_size)
        pixels = encoder.vision.pixels(image)
        expected = stock(processor, image)
        found = ours(processor, pixels, expected, image.size)
        assert len(found) == len(expected), size
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype == np.float32 and np.array_equal(one, other), size


@pytest.mark.parametrize("file", sorted(bases.FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_so_they_are_as_published(file, tmp_path):
    base, image = bases.find_base(file.stem.replace("--", "/")), drawn(509, 331)
    base.image_processor.save_pretrained(tmp_path)
    for media in ({}, {"image_splitting": True}) if base.family.splits else ({},):
        processor = told(tmp_path, base.family, base.config, media)
        expected = stock(processor, image)
        found = ours(processor, base.vision(MediaRecipe(**media)).pixels(image), expected, image.size)
        assert len(found) == len(expected) and all(map(np.array_equal, found, expected))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden fixtures are not beside the repository")
def test_clip_cuts_out_the_middle():
    processor = AutoImageProcessor.from_pretrained(GOLDEN / "mllava_clip_llama3", backend="pil")
    config = bases.find_base("TIGER-Lab/Mantis-8B-clip-llama3").config
    for size in [*SIZES, (57, 56), (113, 56), (56, 171)]:
        for image in (noise(*size), drawn(*size)):
            (expected,) = stock(processor, image)
            pixels = llava_vision(config, processor, MediaRecipe(), ()).pixels(image)
            assert np.array_equal(
                look_up(torch.from_numpy(pixels["pixel_values"][0].copy()), levels_of(processor)), expected
            )


OTHERS = {
    "squared by Blip": {"image_processor_type": "BlipImageProcessor", "size": {"height": 28, "width": 28}},
    "padded by Llava": {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    },
    "a crop that is wider": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 28, "width": 28},
        "do_normalize": False,
    },
    "neither rescaled": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 28, "width": 28},
        "do_rescale": False,
        "do_normalize": False,
    },
}


def processor_of(folder, settings: dict):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("which", OTHERS)
def test_another_processor_of_a_llava_is_its_own_judge(checkpoint_of, tmp_path, which):
    processor, config = processor_of(tmp_path, OTHERS[which]), checkpoint_of("llava").config
    vision = llava_vision(config, processor, MediaRecipe(), ())
    for size in SIZES:
        found = vision.pixels(noise(*size))["pixel_values"]
        assert found.dtype == np.uint8
        assert np.array_equal(
            look_up(torch.from_numpy(found[0].copy()), levels_of(processor)), *stock(processor, noise(*size))
        )


def test_one_whose_numbers_are_no_levels_is_refused(checkpoint_of, tmp_path):
    """Filled up with zeros behind the normalisation, and zero is half way between two levels."""
    padding = {"do_pad": True, "pad_size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 20}}
    processor = processor_of(tmp_path, size | padding)
    with pytest.raises(RecipeError, match="SiglipImageProcessorPil, whose numbers are not those of 256 levels"):
        llava_vision(checkpoint_of("llava").config, processor, MediaRecipe(), ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_those_of_numbers(checkpoint_of, model_of, family, dtype):
    checkpoint = checkpoint_of(family)
    encoder, model = checkpoint.encoder(recipe()), deepcopy(model_of(family)).to(dtype)
    encoded = encoder.encode(parse(ROW, "rows:1", None))
    found = []
    for sample in (encoded, in_numbers(encoded, checkpoint.image_processor)):
        model.zero_grad()
        batch = collate([sample], encoder.vision.batch)
        if dtype != torch.float32 and sample is not encoded and family == "fuyu":
            name = next(name for name, value in batch.items() if torch.is_tensor(value) and value.is_floating_point())
            batch[name] = batch[name].to(dtype)  # as transformers has it: no layer of the stock model turns it into
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (other, others) = found
    assert loss.isfinite() and torch.equal(loss, other) and gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_levels_are_no_weights(checkpoint_of, model_of, family):
    model = model_of(family)
    stock = AutoModelForImageTextToText.from_pretrained(checkpoint_of(family).folder)
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert dict(model.named_buffers()).keys() == dict(stock.named_buffers()).keys()


def tensors_of(value):
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


def test_no_numbers_leave_a_worker(encoder_of, family):
    """What a DataLoader's worker sends: whole numbers, the pictures a byte each."""
    encoder, samples = encoder_of(family), [parse(ROW, "rows:1", None)] * 2
    rows = pack_dataset(Packs.of([[0, 1]]), samples, encoder, refuse)
    loader = DataLoader(
        rows, batch_size=1, num_workers=1, collate_fn=lambda found: collate(found[0]["encoded"], encoder.vision.batch)
    )
    (batch,) = loader
    sent = [tensor for value in batch.values() for tensor in tensors_of(value)]
    assert not any(tensor.is_floating_point() for tensor in sent)
    pictures = [tensor for tensor in sent if tensor.dtype == torch.uint8]
    expected = sum(
        array.nbytes
        for s in samples
        for p in encoder.encode(s).pixels
        for array in p.values()
        if array.dtype == np.uint8
    )
    assert 0 < sum(tensor.numel() for tensor in pictures) <= expected


def test_an_estimate_counts_bytes(checkpoint_of, encoder_of, family):
    """Those of the pictures on the card, once in a step and twice where those of another pack wait."""
    checkpoint, encoder = checkpoint_of(family), encoder_of(family)
    encoded = encoder.encode(parse(ROW, "rows:1", None))
    sent = [t for value in encoder.vision.batch(encoded.pixels).values() for t in tensors_of(value)]
    blocks = [-(-tensor.numel() // BLOCK) * BLOCK for tensor in sent if tensor.dtype == torch.uint8]
    sizes = [PIL.Image.open(io.BytesIO(image["bytes"])).size for image in ROW["images"]]
    grids = [each for size in sizes for each in grids_of(encoder.vision, size)]
    shown = sum(map(encoder.vision.placeholders, sizes))
    pack = Pack(len(encoded), len(encoded), 4, tuple(grids), shown=shown)
    for waiting in (0, 1):
        peaks = walk(checkpoint.config, recipe(), replace(pack, waiting=waiting), Machine(), checkpoint.family)
        assert max(terms["pixels"] for terms in peaks.values()) == sum(blocks) * (1 + waiting)


def test_the_stock_layout_is_no_bytes(checkpoint_of, model_of, encoder_of):
    made = stock_batch(checkpoint_of("idefics2"), encoder_of("idefics2"), ROW)
    with pytest.raises(AssertionError, match="no level"):
        model_of("idefics2")(**made | {"pixel_values": made["pixel_values"].to(torch.uint8)})


# media.backend=fast


def image_of(content: bytes) -> Image:
    return Image(content)


@needs_turbo
@pytest.mark.parametrize("orientation", [1, *UPRIGHT])
@pytest.mark.parametrize("max_size", [None, 200])
def test_all_of_a_jpeg_is_what_pillow_makes_of_it(orientation, max_size):
    """And one that is turned is never less."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = image_of(as_jpeg(drawn(301, 203), exif=exif))
    expected = open_image(image, WHERE, max_size)
    found = open_turbo(image, WHERE, max_size, lambda size: (10, 10) if orientation != 1 else size)
    assert found.size == expected.size == np.asarray(found).shape[1::-1]
    if max_size is None:
        assert np.array_equal(found, expected)
    else:
        assert far(found, expected) < 0.5


def far(one, other) -> float:
    return float(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).mean())


@needs_turbo
@pytest.mark.parametrize(("needed", "by"), [(700, 1), (400, 2), (301, 2), (300, 4), (150, 8), (10, 8)])
def test_a_large_jpeg_is_decoded_as_small_as_is_enough(needed, by):
    image = image_of(as_jpeg(drawn(1203, 805)))
    found = open_turbo(image, WHERE, None, lambda size: (needed, needed * size[1] // size[0]))
    whole = open_image(image, WHERE)
    assert found.size == whole.size and by in REDUCTIONS
    assert found.pixels.shape[1::-1] == tuple(-(-side // by) for side in whole.size)
    assert found.by == by and found.pixels.shape[1] >= needed
    small = found.size[0] // by, found.size[1] // by
    assert far(found.resize(small), whole.resize(small)) < 1


ODD = {
    "grey": lambda image: as_jpeg(image.convert("L")),
    "CMYK": lambda image: as_jpeg(image.convert("CMYK")),
    "progressive": lambda image: as_jpeg(image, progressive=True),
    "colours in full": lambda image: as_jpeg(image, subsampling=0),
    "something behind": lambda image: as_jpeg(image) + b"\0" * 999,
    "PNG": lambda image: saved(image, "PNG"),
    "transparent": lambda image: saved(image.convert("RGBA").rotate(20), "PNG"),
    "16 bits": lambda image: saved(PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
    "WebP": lambda image: saved(image, "WEBP"),
}


def saved(image: PIL.Image.Image, kind: str) -> bytes:
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


@needs_turbo
@pytest.mark.parametrize("which", ODD)
def test_what_is_odd_is_seen_as_pillow_sees_it(which):
    image = image_of(ODD[which](drawn(301, 203)))
    assert np.array_equal(open_turbo(image, WHERE, None, all_of_it), open_image(image, WHERE))


BROKEN = {
    "cut": lambda content: content[: len(content) // 2],
    "cut at its end": lambda content: content[:-40],
    "cut in its header": lambda content: content[:100],
    "no picture": lambda content: b"text",
    "spoilt": lambda content: content[:600] + bytes(300) + content[900:],
}


@needs_turbo
@pytest.mark.parametrize("which", BROKEN)
def test_what_is_broken_is_told_as_pillow_tells_it(which):
    image = image_of(BROKEN[which](as_jpeg(drawn(301, 203))))
    told = []
    for read in (lambda: open_image(image, WHERE), lambda: open_turbo(image, WHERE, None, lambda size: (20, 20))):
        try:
            told.append(np.asarray(read()).tobytes())
        except SampleError as error:
            told.append(str(error))
    assert told[0] == told[1]
    assert which == "spoilt" or "cannot be read" in told[0]


@needs_turbo
@pytest.mark.parametrize(("name", "media"), EACH_MEDIA, ids=str)
def test_fast_has_the_same_lengths_and_about_the_same_pictures(checkpoint_of, name, media):
    """A level of 256 apart on average, of pictures of any size, in every family."""
    checkpoint = checkpoint_of(name)
    both = [checkpoint.encoder(recipe(media=media | {"backend": backend})) for backend in ("pil", "fast")]
    contents = [as_jpeg(drawn(*size)) for size in [*SIZES, (1203, 805), (640, 1001)]]
    images = [Image(content) for content in [*contents, picture(3, 90, 60)]]
    sample = Sample("made:1", None, (Turn("user", (*images, "?")), Turn("assistant", ("yes",))))
    pil, fast = (encoder.encode(sample) for encoder in both)
    assert np.array_equal(pil.input_ids, fast.input_ids) and both[1].measure([sample])[0].tokens == len(fast)
    for one, other in zip(pil.pixels, fast.pixels, strict=True):
        for array, near in zip(one.values(), other.values(), strict=True):
            assert array.shape == near.shape and array.dtype == near.dtype
            assert array.dtype != np.uint8 or far(array, near) < 1
    assert both[0].fingerprint == both[1].fingerprint


@needs_turbo
def test_a_part_is_scaled_as_pillow_scales_it():
    image = drawn(300, 201)
    whole = Turbo(np.array(image), image.size)
    box = (13, 20, 213, 199)
    assert np.array_equal(whole.crop(box), image.crop(box)) and whole.crop(box).size == image.crop(box).size
    for filter in PIL.Image.Resampling:
        for size in ((96, 60), (300, 90), (310, 400), (300, 201)):
            assert far(whole.resize(size, filter), image.resize(size, filter)) < 0.1, (filter, size)
    half = Turbo(np.array(image.reduce(2)), image.size, 2)
    assert half.crop(box).size == (200, 179) and half.crop(box).pixels.shape == (90, 100, 3)
    assert far(half.crop(box).resize((50, 45)), image.crop(box).resize((50, 45))) < 2


def test_without_its_package_fast_is_refused(checkpoint_of, monkeypatch):
    monkeypatch.setattr("mantis_lite.data.turbo.find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r'media.backend: fast needs simplejpeg.*\n  pip install "mantis-lite\[fast\]"'
    ):
        checkpoint_of("llava").encoder(recipe(media={"backend": "fast"}))
    checkpoint_of("llava").encoder(recipe())


@needs_turbo
def test_another_backend_is_another_path_of_the_data(checkpoint_of):
    fast, pil = recipe(media={"backend": "fast"}), recipe()
    (change,) = _changes(pil, fast)
    assert change == 'media.backend: "pil" before, "fast" now' and not change.startswith(FREE)
    checkpoint = checkpoint_of("llava")
    assert [facts_of(checkpoint, checkpoint.encoder(each)).backend for each in (pil, fast)] == ["pil", "fast"]


@needs_turbo
def test_a_run_is_asked_as_it_was_trained(folder_of, tmp_path):
    """JPEGs, in training and then; and pil in its place is refused."""
    (tmp_path / "a.jpg").write_bytes(as_jpeg(drawn(301, 203)))
    turns = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A dog"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"images": ["a.jpg"], "messages": turns}] * 2))
    made = {"data": str(tmp_path / "rows.json"), "run_dir": str(tmp_path / "run"), "media": {"backend": "fast"}}
    train(recipe(folder_of("llava"), train={"max_steps": 1, "save_strategy": "no"}, **made))
    opened = open_trained(tmp_path / "run")
    assert opened.encoder.frames.media.backend == "fast"
    assert read_contract(opened.adapter).facts.backend == "fast"
    with pytest.raises(RecipeError, match="backend"):
        open_trained(tmp_path / "run", ["media.backend=pil"])
