"""What each family states holds for its model: lengths, pixels, layout, adapters, 4 bits and generation."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from families import FAMILIES, M_ROPE
from helpers import chat, numbers_of, picture, recipe
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor

from mantis_lite.data.collate import collate
from mantis_lite.data.encode import IGNORE
from mantis_lite.data.lengths import Measured
from mantis_lite.data.media import open_image
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.data.schema import parse
from mantis_lite.errors import RecipeError, SampleError
from mantis_lite.generate import answer
from mantis_lite.models.adapters import make_trainable, part_of, part_sizes
from mantis_lite.models.attention import use_attention
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import load_model
from mantis_lite.report.check import render_tokens

ROW = chat("What is <image> beside <image><image>?", "small red circle", images=(1, 2, 3))
TEXT = chat("Only words.", "No picture")

# One thing at a time: what a family's splitting and size do to a picture.
MEDIA = {
    "llava": [{}, {"max_image_size": 30}],
    "idefics2": [{}, {"image_splitting": True}, {"max_image_size": 50}],
    "idefics3": [{}, {"image_splitting": False}, {"max_image_size": 56}, {"max_image_size": 30}],
    "smolvlm": [{}, {"image_splitting": False}, {"max_image_size": 112}],
    "fuyu": [{}, {"max_image_size": "480p"}, {"max_image_size": 40}],
    "qwen2_vl": [{}, {"max_image_size": 60}],
    "qwen2_5_vl": [{}],
    "qwen3_vl": [{}],
}
EACH_MEDIA = [(name, media) for name, settings in MEDIA.items() for media in settings]


def sample_of(row: dict) -> Sample:
    return parse(row, "rows:1", None)


def batch_of(encoder, *rows):
    return collate([encoder.encode(sample_of(row)) for row in rows], encoder.vision.batch)


@cache
def noise(width: int, height: int) -> Image:
    return Image(picture(width * 1000 + height, width, height))


sides = st.integers(3, 200)
shapes = st.lists(st.tuples(sides, sides), max_size=3)


@pytest.mark.parametrize(("name", "media"), EACH_MEDIA, ids=str)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=shapes, text=st.sampled_from(["", " and ", "\n"]))
@example(shapes=[(84, 84), (28, 28), (29, 200), (200, 29)], text="")
@example(shapes=[(5, 190), (190, 5)], text="x")
def test_measure_is_the_length_of_encode(checkpoint_of, name, media, shapes, text):
    encoder = checkpoint_of(name).encoder(recipe(media=media))
    content = [part for width, height in shapes for part in (noise(width, height), text) if part]
    sample = Sample("made:1", None, (Turn("user", (*content, "?")), Turn("assistant", ("yes",))))
    encoded = encoder.encode(sample)
    (length,) = encoder.measure([sample])
    assert length.tokens == len(encoded) == len(encoded.labels)
    assert (encoded.positions is None) or encoded.positions.shape[1] == len(encoded)
    assert len(encoded.pixels) == len(shapes)
    assert length.patches == sum(map(patches_of(checkpoint_of(name)), encoded.pixels))
    assert not (encoded.labels[encoded.input_ids == encoder.token_id(encoder.vision.placeholder)] != IGNORE).any()


def patches_of(checkpoint):
    """Counts the positions that one picture takes in the tower, from its arrays."""
    kind, tower = checkpoint.config.model_type, getattr(checkpoint.config, "vision_config", None)

    def count(pixels) -> int:
        if kind == "idefics2":
            return sum((view.shape[1] // 14) * (view.shape[2] // 14) for view in pixels.values())
        if kind == "fuyu" or kind.startswith("qwen"):
            return len(next(iter(pixels.values())))
        return len(pixels["pixel_values"]) * (tower.image_size // tower.patch_size) ** 2

    return count


@pytest.mark.parametrize(("name", "media"), EACH_MEDIA, ids=str)
def test_a_model_takes_what_is_written_for_it(checkpoint_of, model_of, name, media):
    """As many placeholders as the tower gives features: models refuse anything else."""
    encoder = checkpoint_of(name).encoder(recipe(media=media))
    row = chat("<image><image> and <image><image>", "x", images=(1, 2, 3, 4))
    with torch.no_grad():
        assert model_of(name)(**batch_of(encoder, row, TEXT)).loss.isfinite()


@pytest.fixture(scope="session")
def model_of(checkpoint_of):
    return cache(lambda name: load_model(checkpoint_of(name), recipe()).eval())


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_what_a_sample_sees_is_in_its_order(model_of, encoder_of, family):
    """Other pictures, or the same in another order, are other logits: none is lost or swapped on its way."""
    model, encoder = model_of(family), encoder_of(family)
    same, again, swapped, other = (
        logits_of(model, batch_of(encoder, chat("<image> <image> <image>?", "yes", images=seeds)))[0, -1]
        for seeds in ((1, 2, 7), (1, 2, 7), (7, 2, 1), (1, 2, 13))
    )
    assert torch.equal(same, again)
    assert (same - swapped).abs().max() > 1e-4 and (same - other).abs().max() > 1e-4


def test_pictures_of_one_shape_go_through_the_tower_together(encoder_of):
    """40 x 30 and 30 x 40 in turns of the patches that are whole: none is padded, and their order is kept."""
    batch = batch_of(encoder_of("idefics2"), chat("x", "y", images=(0, 1, 6, 7, 12)))
    groups = {tuple(views.shape[2:]): members.tolist() for members, views in batch["pixel_values"]}
    assert groups == {(28, 28): [0, 1, 2, 3, 4]}
    batch = batch_of(encoder_of("idefics2"), chat("x", "y", images=(0, 3, 2, 6, 3)))
    groups = {tuple(views.shape[2:]): members.tolist() for members, views in batch["pixel_values"]}
    assert groups == {(28, 28): [0, 3], (56, 84): [1, 4], (28, 56): [2]}


def test_no_more_patches_at_a_time_than_a_bound(monkeypatch, encoder_of, model_of):
    model, encoder, row = model_of("idefics2"), encoder_of("idefics2"), chat("x", "y", images=tuple(range(12)))
    together = batch_of(encoder, row)
    monkeypatch.setattr("mantis_lite.models.tower.TOWER_PATCHES", 9)
    apart = batch_of(encoder, row)
    for members, views in apart["pixel_values"]:
        assert len(members) == 1 or len(views) * (views.shape[2] // 14) * (views.shape[3] // 14) <= 9
    assert len(apart["pixel_values"]) > len(together["pixel_values"])
    torch.testing.assert_close(logits_of(model, apart), logits_of(model, together), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "idefics3", "smolvlm"])
def test_pictures_go_through_the_tower_a_few_at_a_time(monkeypatch, checkpoint_of, encoder_of, name):
    """Loss and gradients of a projector that trains, which is computed again, are those of all pictures at once."""
    checkpoint, encoder = checkpoint_of(name), encoder_of(name)
    batch = batch_of(encoder, chat("x", "y", images=tuple(range(5))))
    found, seen = [], []
    for patches, checkpointing in ((10**9, "off"), (1, "full")):
        monkeypatch.setattr("mantis_lite.models.tower.TOWER_PATCHES", patches)
        memory = {"checkpointing": checkpointing}
        model = trainable(checkpoint, method="lora", trainable={"projector": "full"}, memory=memory).train()
        tower = model.get_submodule(f"base_model.model.{checkpoint.family.parts['vision_tower'][0]}")
        seen.append([])
        tower.register_forward_pre_hook(lambda *given: seen[-1].append(1))
        loss = model(**batch).loss
        loss.backward()
        trained = [p.grad for n, p in model.named_parameters() if p.grad is not None and "lora" not in n]
        found.append((loss, torch.cat([gradient.flatten() for gradient in trained])))
    (together, gradient), (apart, other) = found
    assert len(seen[0]) == 1 and len(seen[1]) >= 5
    assert apart.item() == pytest.approx(together.item(), abs=1e-5)
    torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_no_gradient(checkpoint_of, encoder_of, family):
    checkpoint, gradients = checkpoint_of(family), []
    for checkpointing in (False, True):
        model = trainable(checkpoint, method="full", trainable=dict.fromkeys(checkpoint.family.parts, "full")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch_of(encoder_of(family), ROW, TEXT)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    without, with_it = gradients
    assert without.keys() == with_it.keys()
    for name, gradient in without.items():
        torch.testing.assert_close(with_it[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_sample_is_shown_with_a_mark_for_each_picture(encoder_of, family):
    encoder = encoder_of(family)
    encoded = encoder.encode(sample_of(ROW))
    marks = [stretch.text for stretch in render_tokens(encoder, encoded) if stretch.text.startswith("[picture: ")]
    assert marks == [f"[picture: {end - start} tokens]" for start, end in encoded.spans]
    sizes = [PIL.Image.open(io.BytesIO(image["bytes"])).size for image in ROW["images"]]
    for (start, end), size in zip(encoded.spans, sizes, strict=True):
        assert encoded.input_ids[start:end].tolist() == encoder.picture_ids(size).tolist()


def stock_batch(checkpoint, encoder, row, media=None) -> dict:
    """A sample as transformers' own processors lay it out, with our ids."""
    media, kind = media or {}, checkpoint.config.model_type
    sample = sample_of(row)
    encoded = encoder.encode(sample)
    inputs = {"input_ids": torch.from_numpy(encoded.input_ids)[None]}
    pictures = [open_image(image, sample, encoder.max_image_size) for image in sample.images]
    if kind == "fuyu":  # its own processor takes one picture only
        numbers = [{"patches": numbers_of(each["patches"], checkpoint.image_processor)} for each in encoded.pixels]
        return inputs | encoder.vision.batch(numbers)
    processor = AutoImageProcessor.from_pretrained(checkpoint.folder, backend="pil")
    nested = [pictures] if kind in ("idefics2", "idefics3", "smolvlm") else pictures
    settings = {"do_image_splitting": media["image_splitting"]} if "image_splitting" in media else {}
    if kind in ("idefics3", "smolvlm") and "max_image_size" in media:
        settings["size"] = {"longest_edge": media["max_image_size"]}
    made = dict(processor(nested, return_tensors="pt", **settings))
    if kind.startswith("qwen"):
        placeholder = encoder.token_id(encoder.vision.placeholder)
        made["mm_token_type_ids"] = (inputs["input_ids"] == placeholder).int()
    return inputs | made


@pytest.mark.parametrize(("name", "media"), EACH_MEDIA, ids=str)
def test_our_layout_gives_the_logits_of_transformers_own(checkpoint_of, model_of, name, media):
    """Pictures by shape, in tiles or in patches are what the stock processor makes, padding and all."""
    checkpoint, model = checkpoint_of(name), model_of(name)
    encoder = checkpoint.encoder(recipe(media=media))
    ours = logits_of(model, batch_of(encoder, ROW))
    use_attention(model, "sdpa")
    stock = logits_of(model, stock_batch(checkpoint, encoder, ROW, media))
    use_attention(model, "auto")
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)


def test_a_black_photograph_is_a_picture(model_of, encoder_of, family):
    """transformers' Idefics models drop images of zeros as padding; a black one is not made of zeros."""
    black = io.BytesIO()
    PIL.Image.new("RGB", (40, 30)).save(black, "PNG")
    row = ROW | {"images": [{"bytes": black.getvalue()}, *ROW["images"][1:]]}
    encoder, model = encoder_of(family), model_of(family)
    batch, other = batch_of(encoder, row), batch_of(encoder, ROW)
    assert batch["input_ids"].shape == other["input_ids"].shape or family.startswith(("qwen", "fuyu"))
    logits = logits_of(model, batch)
    assert logits.isfinite().all() and (logits[0, -1] - logits_of(model, other)[0, -1]).abs().max() > 1e-4


def test_a_literal_mark_in_a_text_only_row_stays_text(model_of, encoder_of, family):
    encoder = encoder_of(family)
    sample = sample_of(chat("HTML has <image>", "Yes"))
    encoded = encoder.encode(sample)
    assert encoder.token_id(encoder.vision.placeholder) not in encoded.input_ids
    assert "HTML has <image>" in encoder.tokenizer.decode(encoded.input_ids.tolist())
    assert not encoded.pixels and encoder.measure([sample])[0] == Measured(len(encoded), 0, 0)
    assert logits_of(model_of(family), collate([encoded])).isfinite().all()


@pytest.mark.parametrize("text", ["|SPEAKER|", "<0x04>", "\x04", "|ENDOFTEXT|"])
def test_text_that_a_tokenizer_cannot_tell_from_a_token_is_an_error(encoder_of, text):
    """Fuyu's marks are pieces of its vocabulary: no spelling of them is text."""
    encoder = encoder_of("fuyu")
    sample = sample_of(chat(f"say {text} now", "no"))
    message = f"rows:1: a turn has the text {text!r}, which this tokenizer takes for a special token\n  Write it with"
    for use in (encoder.encode, encoder.encode_prompt, encoder.render):
        with pytest.raises(SampleError) as caught:
            use(sample)
        assert str(caught.value).startswith(message)
    (measured,) = encoder.measure([sample])
    assert isinstance(measured, SampleError) and str(measured).startswith(message)
    assert not any(encoder_of(name).reserved for name in FAMILIES if name != "fuyu")


def test_a_shape_no_family_member_takes_is_an_error_of_the_row(encoder_of):
    """No picture is longer than 200 times its other side, but one that is scaled, where that side is rounded down."""
    sample = Sample("rows:1", None, (Turn("user", (noise(4000, 20), "?")), Turn("assistant", ("x",))))
    encoder = replace(encoder_of("qwen2_vl"), max_image_size=3999)
    (measured,) = encoder.measure([sample])
    with pytest.raises(SampleError) as caught:
        encoder.encode(sample)
    for error in (measured, caught.value):
        assert str(error).startswith("rows:1: a picture of 3999 x 19 pixels: absolute aspect ratio must be smaller")


@pytest.mark.parametrize("name", ["llava", "fuyu", "qwen2_vl"])
def test_splitting_is_refused_where_it_means_nothing(checkpoint_of, name):
    with pytest.raises(RecipeError, match=rf"media.image_splitting: {name} does not split pictures\n  Leave it out"):
        checkpoint_of(name).encoder(recipe(media={"image_splitting": True}))


def test_a_named_size_is_fuyus(checkpoint_of):
    with pytest.raises(RecipeError, match=r"media.max_image_size: 720p is a size of Fuyu's, and this is idefics2"):
        checkpoint_of("idefics2").encoder(recipe(media={"max_image_size": "720p"}))


def test_more_tiles_than_a_tokenizer_has_names_for(checkpoint_of):
    message = (
        "media.max_image_size: a large picture needs <row_1_col_5>, and the tokenizer has no such token\n  Set it low"
    )
    with pytest.raises(RecipeError, match=message):
        checkpoint_of("smolvlm").encoder(recipe(media={"max_image_size": 140}))


def test_saving_keeps_the_published_layout(model_of, folder_of, family, tmp_path):
    model_of(family).save_pretrained(tmp_path)
    published, saved = (load_file(folder / "model.safetensors") for folder in (folder_of(family), tmp_path))
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[key], published[key]) for key in published)


def has_tower(checkpoint) -> bool:
    return "vision_tower" in checkpoint.family.parts


def test_todays_names_load_as_well_as_the_published(model_of, folder_of, family, tmp_path):
    """A checkpoint may have been written with the names that its modules have in memory now."""
    folder = shutil.copytree(folder_of(family), tmp_path / "today")
    weights = model_of(family).state_dict()
    published = load_file(folder / "model.safetensors")
    todays = {name: weight.clone() for name, weight in weights.items()}
    save_file(todays, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(open_checkpoint(recipe(folder).model), recipe(folder)).state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert todays.keys() != published.keys() or family in ("idefics2", "idefics3", "smolvlm", "qwen3_vl")


def everything(checkpoint) -> dict[str, str]:
    return {"language_model": "adapter", "projector": "full"} | (
        {"vision_tower": "adapter"} if has_tower(checkpoint) else {}
    )


def trainable(checkpoint, **settings):
    wanted = recipe(checkpoint.name, **settings)
    torch.manual_seed(0)
    return make_trainable(load_model(checkpoint, wanted), wanted, checkpoint.family)


def steps(model, batch, count: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for _ in range(count):  # a LoRA's A moves once its B is no longer 0
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


WHOLE_TOWERS = ["tower full", "tower full, projector adapter", "tower and projector full"]


@pytest.mark.parametrize("parts", ["default", "projector adapter", "everything", "full", *WHOLE_TOWERS])
def test_every_trained_part_moves_and_no_other(checkpoint_of, encoder_of, family, parts):
    checkpoint = checkpoint_of(family)
    full = dict.fromkeys(checkpoint.family.parts, "full")
    chosen = {
        "default": {"trainable": {}},
        "projector adapter": {"trainable": {"projector": "adapter"}},
        "everything": {"trainable": everything(checkpoint)},
        "full": {"trainable": full, "method": "full"},
        "tower full": {"trainable": {"vision_tower": "full"}},
        "tower full, projector adapter": {"trainable": {"vision_tower": "full", "projector": "adapter"}},
        "tower and projector full": {"trainable": {"vision_tower": "full", "projector": "full"}},
    }[parts]
    if parts in WHOLE_TOWERS and "vision_tower" not in checkpoint.family.parts:
        pytest.skip("has no vision tower")
    model = trainable(checkpoint, **chosen)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    steps(model, batch_of(encoder_of(family), ROW))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    # LLaVA reads one layer less than its tower has; what is not part of a picture's way cannot learn.
    unread = {name for name in wanted if "vision_tower" in name and ("layers.2" in name or "post_layernorm" in name)}
    assert moved == wanted - unread
    settings = recipe(**chosen)
    expected = {part for part in checkpoint.family.parts if settings.part(part) != "frozen"}
    assert {part_of(name, checkpoint.family) for name in moved} == expected
    assert {size.part for size in part_sizes(model, checkpoint.family) if size.trainable} == expected


def test_a_part_that_a_family_lacks(checkpoint_of):
    with pytest.raises(RecipeError, match=r"trainable.vision_tower: fuyu has none\n  Leave it out"):
        checkpoint_of("fuyu").encoder(recipe(trainable={"vision_tower": "adapter"}))


def test_only_the_language_model_is_in_4_bits(checkpoint_of, family, encoder_of):
    from bitsandbytes.nn import Linear4bit

    checkpoint = checkpoint_of(family)
    model = load_model(checkpoint, recipe(checkpoint.name, method="qlora"))
    linear = {
        name: isinstance(module, Linear4bit) for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    (language_model,) = checkpoint.family.parts["language_model"]
    assert {name for name, quantized in linear.items() if quantized} == {
        n for n in linear if n.startswith(language_model)
    }
    trained = make_trainable(model, recipe(checkpoint.name, method="qlora"), checkpoint.family).train()
    steps(trained, batch_of(encoder_of(family), ROW))


IN_A_PROCESS = """
import json, sys, torch
sys.modules["mantis_lite"] = None  # not to be imported
from peft import PeftModel
from transformers import AutoModelForImageTextToText
for base, folder in json.loads(sys.argv[1]):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    found = torch.load(folder + "/tensors")
    expected = found.pop("logits")
    with torch.no_grad():
        logits = model(**found, use_cache=False).logits
    assert (logits - expected).abs().max() < 1e-4, base
"""


@pytest.mark.slow
def test_adapters_need_no_mantis_lite(checkpoint_of, encoder_of, tmp_path):
    """A process with plain transformers and peft, and transformers' own layout of the pictures, gets our logits."""
    folders = []
    whole = {"vision_tower": "full", "projector": "full"}
    for family, more in [*((name, {"lora": {"dora": True}}) for name in FAMILIES), *((name, whole) for name in M_ROPE)]:
        checkpoint, encoder = checkpoint_of(family), encoder_of(family)
        settings = {"trainable": more} if more is whole else more | {"trainable": everything(checkpoint)}
        model = trainable(checkpoint, **settings)
        steps(model, batch_of(encoder, ROW))
        folder = tmp_path / f"{family}-{len(folders)}"
        model.save_pretrained(folder)
        logits = logits_of(model.eval(), batch_of(encoder, ROW))
        torch.save(stock_batch(checkpoint, encoder, ROW) | {"logits": logits}, folder / "tensors")
        folders.append((checkpoint.name, str(folder)))
    command = [sys.executable, "-I", "-c", IN_A_PROCESS, json.dumps(folders)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("row", [ROW, TEXT], ids=["pictures", "text"])
def test_an_answer_is_the_likeliest_tokens_one_by_one(model_of, encoder_of, family, row):
    """Generating with a cache, and the same a token at a time through the batch that is trained on."""
    model, encoder = model_of(family), encoder_of(family)
    sample = sample_of(row)
    asked = replace(sample, turns=sample.turns[:-1])
    encoded = encoder.encode_prompt(asked)
    placeholder = encoder.token_id(encoder.vision.placeholder)
    ids = encoded.input_ids
    for _ in range(5):
        positions = None
        if encoder.vision.positions:
            positions = encoder.vision.positions(ids == placeholder, encoded.pixels)
        now = replace(encoded, input_ids=ids, labels=np.full(len(ids), IGNORE), positions=positions)
        likeliest = logits_of(model, collate([now], encoder.vision.batch))[0, -1].argmax().item()
        ids = np.append(ids, likeliest)
        if likeliest in (placeholder, encoder.token_id(encoder.template.end)):
            break
    expected = encoder.tokenizer.decode(ids[len(encoded) :].tolist(), skip_special_tokens=True).strip()
    found = answer(model, encoder, asked, max_new_tokens=len(ids) - len(encoded))
    assert found == expected


@pytest.mark.parametrize("name", M_ROPE)
def test_a_frozen_tower_records_nothing_though_its_merger_trains(checkpoint_of, encoder_of, name):
    """Qwen's projector lies within its tower: the rest of the tower stays out of the backward pass all the same."""
    model = trainable(checkpoint_of(name), trainable={"projector": "full"}).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    seen = []
    for block in model.get_base_model().model.visual.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model(**batch_of(encoder_of(name), ROW)).loss.backward()
    assert seen and not any(seen)


def test_the_fast_processors_name_is_taken_too(folder_of, checkpoint_of):
    """Published Qwen checkpoints may name the torchvision class; its PIL twin is loaded."""
    named = json.loads((Path(folder_of("qwen3_vl")) / "preprocessor_config.json").read_text())
    assert named["image_processor_type"].endswith("Fast")
    assert type(checkpoint_of("qwen3_vl").image_processor).__name__ == "Qwen2VLImageProcessorPil"
