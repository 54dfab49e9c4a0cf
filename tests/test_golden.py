"""What the original Mantis computed on real rows, case by case, through our encoder, batch and attention."""

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, recipe
from safetensors.torch import load_file

from mantis_lite.data.collate import collate
from mantis_lite.data.encode import IGNORE
from mantis_lite.data.prepare import too_large
from mantis_lite.data.schema import Image, Sample, Turn, parse
from mantis_lite.errors import FitError, SampleError
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import load_model
from mantis_lite.recipe import PackingRecipe

GOLDEN = SHARED / "golden"
NAMES = ["mllava_siglip_llama3", "mllava_clip_llama3", "mllava_clip_vicuna"]
REFUSED = ("more_placeholders", "trunc_text", "trunc_images", "trunc_all_images")

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden fixtures are not beside this checkout")


@cache
def records(name: str) -> dict:
    file = GOLDEN / "forward" / f"{name}.json"
    return json.loads(file.read_text())["cases"] if file.is_file() else {}


CASES = [(name, case) for name in NAMES for case in records(name) if case not in (*REFUSED, "plain_pretrain")]
TRUNCATED = [(name, case) for name in NAMES for case in records(name) if case.startswith("trunc")]


@pytest.fixture(scope="module")
def opened():
    """Checkpoint, encoder and model by name; labels as upstream's."""
    made = {}

    def get(name):
        if name not in made:
            settings = recipe(GOLDEN / "checkpoints" / name, method="full", prompt={"labels": "upstream"})
            found = open_checkpoint(settings.model)
            made[name] = found, found.encoder(settings), load_model(found, settings).eval()
        return made[name]

    return get


@pytest.fixture(scope="module")
def pictures():
    with np.load(GOLDEN / "images.npz") as files:
        return {Path(name).name: files[name].tobytes() for name in files}


def sample_of(record: dict, pictures: dict[str, bytes]) -> Sample:
    """The recorded row, its pictures' paths replaced by their bytes."""
    sample = parse(record["sample"], "golden:1", Path())

    def at_hand(part):
        return Image(pictures[part.source.name]) if isinstance(part, Image) else part

    return replace(sample, turns=tuple(Turn(t.role, tuple(map(at_hand, t.content))) for t in sample.turns))


def collapsed(ids: np.ndarray, image: int, each: int) -> list[int]:
    """Ids with each picture's run of `each` tokens as one, as upstream's tokenizer sees them."""
    kept, at = [], 0
    while at < len(ids):
        kept.append(int(ids[at]))
        at += each if ids[at] == image else 1
    return kept


@pytest.mark.parametrize(("name", "case"), CASES)
def test_prompt_ids_labels_and_pixels(opened, pictures, name, case):
    record = records(name)[case]
    _, encoder, _ = opened(name)
    sample = sample_of(record, pictures)
    pieces = encoder.render(sample)[1:]  # upstream's tokenizer adds the start token itself
    text = "".join(p.content if isinstance(p.content, str) else "<image>" for p in pieces)
    encoded = encoder.encode(sample)
    with np.load(GOLDEN / "forward" / f"{name}.npz") as arrays:
        ids = arrays[f"{case}/input_ids"].ravel().tolist()
        key = f"{case}/expanded_labels" if sample.images else f"{case}/labels"
        labels = arrays[key].ravel().tolist()
    assert text == record["tokenizer_input"][0]
    image = encoder.token_id("<image>")
    assert collapsed(encoded.input_ids, image, encoder.vision.tokens((56, 56))) == ids
    assert encoded.labels.tolist() == labels
    assert encoder.measure([sample])[0].tokens == len(encoded) == record["seq_len_expanded"]
    if sample.images:
        pixels = np.ascontiguousarray(encoded.pixels["pixel_values"], dtype=np.float32)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == record["pixel_values"]["sha256_fp32"]
    else:
        assert not encoded.pixels and not record["pixel_values"]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_and_loss(opened, pictures, name, case):
    record = records(name)[case]
    _, encoder, model = opened(name)
    batch = collate([encoder.encode(sample_of(record, pictures))])
    with torch.no_grad():
        out = model(**batch)
    logits, labels = out.logits[0], batch["labels"][0, 1:]
    with np.load(GOLDEN / "forward" / f"{name}.npz") as arrays:
        stored = {key.partition("/")[2]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"{case}/")}
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(logits[-8:], stored["logits_last8"], **close)
    torch.testing.assert_close(logits.logsumexp(-1), stored["lse"], **close)
    at_argmax = logits.gather(1, stored["argmax"].long()[:, None])[:, 0]
    torch.testing.assert_close(at_argmax, logits.max(-1).values, **close)  # argmax itself may tie
    targets = logits[:-1].log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    targets[labels == IGNORE] = torch.nan
    torch.testing.assert_close(targets, stored["target_logprob"], equal_nan=True, **close)
    assert out.loss.item() == pytest.approx(record["loss"], abs=1e-5)


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
    model.save_pretrained(tmp_path)
    published = load_file(found.folder / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[key], published[key]) for key in published)
