"""What the original Mantis computed on real rows, case by case, through our encoder, batch and attention."""

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, golden_pictures, keeps_its_layout, numbers_of, recipe
from transformers import AutoConfig

from mantis_lite.data.chunks import too_large
from mantis_lite.data.collate import collate
from mantis_lite.data.encode import IGNORE
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.data.schema import parse
from mantis_lite.errors import FitError, SampleError
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import load_model
from mantis_lite.recipe import PackingRecipe

GOLDEN = SHARED / "golden"
NAMES = ["mllava_siglip_llama3", "mllava_clip_llama3", "mllava_clip_vicuna", "idefics2", "mfuyu"]
REFUSED = ("more_placeholders", "trunc_text", "trunc_images", "trunc_all_images", "text_only_trunc")

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden fixtures are not beside this checkout")


@cache
def records(name: str) -> dict:
    file = GOLDEN / "forward" / f"{name}.json"
    return json.loads(file.read_text())["cases"] if file.is_file() else {}


CASES = [(name, case) for name in NAMES for case in records(name) if case not in REFUSED]
TRUNCATED = [(name, case) for name in NAMES for case in records(name) if case.startswith("trunc")]


@pytest.fixture(scope="module")
def opened():
    """Checkpoint, encoder and model by name; labels as upstream's."""

    @cache
    def get(name, task="chat"):
        prompt = {} if task == "pretrain" else {"labels": "upstream"}
        settings = recipe(GOLDEN / "checkpoints" / name, task=task, method="full", prompt=prompt)
        found = open_checkpoint(settings.model)
        return found, found.encoder(settings), load_model(found, settings).eval()

    return get


@pytest.fixture(scope="module")
def pictures():
    return golden_pictures()


def task_of(record: dict) -> str:
    """How upstream wrote the record: in turns, or plain, as captions."""
    return "pretrain" if record.get("template") == "plain" else "chat"


def sample_of(record: dict, pictures: dict[str, bytes]) -> Sample:
    """The recorded row, its pictures' paths replaced by their bytes."""
    sample = parse(record["sample"], "golden:1", MediaFolder(Path()), task_of(record))

    def at_hand(part):
        return Image(pictures[part.source.name]) if isinstance(part, Image) else part

    return replace(sample, turns=tuple(Turn(t.role, tuple(map(at_hand, t.content))) for t in sample.turns))


def stored(name: str, case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "forward" / f"{name}.npz") as arrays:
        return {key.partition("/")[2]: arrays[key] for key in arrays if key.startswith(f"{case}/")}


def collapsed(ids: np.ndarray, image: int, each: int) -> list[int]:
    """Ids with each picture's run of `each` tokens as one, as upstream's LLaVA tokenizer sees them."""
    kept, at = [], 0
    while at < len(ids):
        kept.append(int(ids[at]))
        at += each if ids[at] == image else 1
    return kept


def texts(encoder, sample: Sample) -> list[str]:
    """What upstream's tokenizer was given: the prompt without the tokens it adds itself; Fuyu's in chunks."""
    name, parts = encoder.template.name, []
    for piece in encoder.render(sample):
        if isinstance(piece.content, Image):
            runs = encoder.vision.tokens((56, 56)) if name == "idefics_2" else [("<image>", 1)]
            parts.append("\0" if name == "mfuyu_v1" else "".join(part * count for part, count in runs))
        elif piece.content not in (encoder.template.start, encoder.vision.wrap.chunk):
            parts.append(piece.content)
    return [text for text in "".join(parts).split("\0") if text]


def pixels_of(name: str, encoded, processor) -> np.ndarray:
    """Our pictures laid out as upstream's processor did: one array, Idefics2's padded to the largest."""
    views = [numbers_of(array, processor) for picture in encoded.pixels for array in picture.values()]
    if name == "mfuyu":
        return np.concatenate(views)[None]
    if name != "idefics2":
        return np.concatenate(views)
    height, width = (max(view.shape[at] for view in views) for at in (1, 2))
    padded = np.zeros((1, len(views), 3, height, width), dtype=np.float32)
    for at, view in enumerate(views):
        padded[0, at, :, : view.shape[1], : view.shape[2]] = view
    return padded


@pytest.mark.parametrize(("name", "case"), CASES)
def test_prompt_ids_labels_and_pixels(opened, pictures, name, case):
    record, arrays = records(name)[case], stored(name, case)
    checkpoint, encoder, _ = opened(name, task_of(record))
    record = records(name)[record["same_sample_as"]] | record if "same_sample_as" in record else record
    if record.get("do_image_splitting"):
        encoder = opened(name)[0].encoder(recipe(prompt={"labels": "upstream"}, media={"image_splitting": True}))
    sample = sample_of(record, pictures)
    encoded = encoder.encode(sample)
    ids, labels = arrays["input_ids"].ravel(), arrays["labels"].ravel()
    if name.startswith("mllava"):
        each = encoder.vision.tokens((56, 56))[0][1]
        assert collapsed(encoded.input_ids, encoder.token_id("<image>"), each) == ids.tolist()
        labels = arrays["expanded_labels"].ravel() if sample.images else labels
    else:
        assert encoded.input_ids.tolist() == ids.tolist()
    if task_of(record) == "pretrain":
        labels[0] = IGNORE  # upstream's has one for the start, which nothing predicts
    if name == "idefics2":
        labels[labels == encoder.token_id("<image>")] = IGNORE  # upstream's ignore value, which no model reads today
        if case == "ends_with_user":
            labels[-2:] = IGNORE  # upstream takes the line's end after the last user turn for an answer
    assert encoded.labels.tolist() == labels.tolist()
    if "do_image_splitting" not in record:
        assert texts(encoder, sample) == record.get("tokenizer_inputs", record.get("tokenizer_input"))
    assert encoder.measure([sample])[0].tokens == len(encoded) == record["seq_len_expanded"]
    if sample.images:
        pixels = np.ascontiguousarray(pixels_of(name, encoded, checkpoint.image_processor), dtype=np.float32)
        key = "image_patches" if name == "mfuyu" else "pixel_values"
        assert list(pixels.shape) == record[key]["shape"]
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == record[key]["sha256_fp32"]
    else:
        assert not encoded.pixels and not record.get("pixel_values")


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in CASES if not c.endswith("split")])
def test_logits_and_loss(opened, pictures, name, case):
    record, arrays = records(name)[case], stored(name, case)
    _, encoder, model = opened(name, task_of(record))
    batch = collate([encoder.encode(sample_of(record, pictures))], encoder.vision.batch)
    if name == "idefics2" and case == "ends_with_user":
        batch["labels"][0, -2:] = batch["input_ids"][0, -2:]  # see above
    with torch.no_grad():
        out = model(**batch)
    logits, labels = out.logits[0], batch["labels"][0, 1:]
    close = {"atol": 1e-4, "rtol": 0}
    if record.get("n_images_with_partial_patches"):
        # Upstream's Idefics2 reads patches that a picture covers in part; transformers' own, then and now, does not.
        assert record["hf4452_max_abs_logit_diff"] > 0.1
        if "hf4452_logits_last8" in arrays:
            torch.testing.assert_close(logits[-8:], torch.from_numpy(arrays["hf4452_logits_last8"]), **close)
        assert out.loss.item() == pytest.approx(record["hf4452_loss_labels_minus100"], abs=1e-5)
        return
    expected = {key: torch.from_numpy(array) for key, array in arrays.items()}
    torch.testing.assert_close(logits[-8:], expected["logits_last8"], **close)
    torch.testing.assert_close(logits.logsumexp(-1), expected["lse"], **close)
    at_argmax = logits.gather(1, expected["argmax"].long()[:, None])[:, 0]
    torch.testing.assert_close(at_argmax, logits.max(-1).values, **close)  # argmax itself may tie
    targets = logits[:-1].log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    targets[labels == IGNORE] = torch.nan
    torch.testing.assert_close(targets, expected["target_logprob"], equal_nan=True, **close)
    assert out.loss.item() == pytest.approx(record["loss"], abs=1e-5)


def test_the_rotary_base_that_a_fuyu_was_trained_with_is_stated(opened):
    """The published text_config leaves it out; transformers' default has changed, and with it every logit."""
    found, _, model = opened("mfuyu")
    assert "rope_theta" not in json.loads((found.folder / "config.json").read_text())["text_config"]
    assert model.config.text_config.rope_parameters["rope_theta"] == 25_000
    assert "rope_theta out; 25,000 is used" in found.notice
    assert opened("idefics2")[0].notice is None


def test_a_mended_config_is_saved_mended(opened, tmp_path):
    found, _, _ = opened("mfuyu")
    found.copy_small_files(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters["rope_theta"] == 25_000
    for file in tmp_path.iterdir():
        assert file.name == "config.json" or file.read_bytes() == (found.folder / file.name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_more_marks_than_pictures_is_an_error(pictures, name):
    with pytest.raises(SampleError, match="2 images but 4 <image> marks"):
        sample_of(records(name)["more_placeholders"], pictures)


@pytest.mark.parametrize(("name", "case"), TRUNCATED)
def test_what_upstream_truncates_is_an_error(opened, pictures, name, case):
    record = records(name)[case]
    sample = sample_of(record, pictures)
    length = opened(name)[1].measure([sample])[0]
    error = too_large(sample, length, PackingRecipe(max_length=record["max_seq_len"]))
    assert isinstance(error, FitError)
    assert f"packing.max_length is {record['max_seq_len']}" in str(error)
    assert too_large(sample, length, PackingRecipe(max_length=length.tokens)) is None


@pytest.mark.parametrize("name", NAMES)
def test_saving_keeps_the_published_layout(opened, tmp_path, name):
    found, _, model = opened(name)
    keeps_its_layout(found, model, tmp_path)
