"""Tiny Mantis: in the published layout, small, able to tell what it sees, and not yet able to find the odd one out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

from mantis_lite.data.encode import Encoder
from mantis_lite.data.template import LLAMA_3
from mantis_lite.generate import answer
from mantis_lite.models.checkpoint import Checkpoint, open_checkpoint
from mantis_lite.models.llava import LLAVA
from mantis_lite.recipe import MediaRecipe, ModelRecipe
from mantis_lite.tiny import CHECKPOINT, build, layout, tasks


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(ModelRecipe(name="tiny"))


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    found = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    LLAVA.adapt(found, AutoImageProcessor.from_pretrained(CHECKPOINT, backend="pil"))
    return found


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_loads_whole_and_saves_back_under_the_published_names(tmp_path):
    model, info = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path)
    assert keys(tmp_path) == keys(CHECKPOINT)
    assert {name.split(".")[0] for name in keys(CHECKPOINT)} == {
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }


def test_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 10_000_000


def test_small_files_are_those_of_the_layout(tmp_path):
    layout.write(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (CHECKPOINT / file.name).read_text()


def test_tokenizer_puts_its_special_tokens_last_and_a_start_in_front(checkpoint):
    ids = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode("a<image>").ids
    assert (ids[0], ids[-1]) == (layout.token_id("<|begin_of_text|>"), layout.token_id("<image>"))
    assert layout.token_id("<|pad|>") == checkpoint.config.text_config.vocab_size - 1
    assert AutoTokenizer.from_pretrained(CHECKPOINT)("a<image>").input_ids == ids


def exact(
    task: Callable[[random.Random], tasks.Exercise],
    count: int,
    checkpoint: Checkpoint,
    model: LlavaForConditionalGeneration,
) -> float:
    """The share of exact answers to questions about pictures drawn for this test."""
    rng = random.Random(f"test {task.__name__}")
    vision = checkpoint.family.vision(checkpoint.config, checkpoint.image_processor, MediaRecipe(), ())
    encoder = Encoder(checkpoint.tokenizer, LLAMA_3, vision, system="")
    album = build.draw_album(2, rng)
    right = 0
    for exercise in [task(rng) for _ in range(count)]:
        sample = build.to_sample(exercise, album, rng)
        right += answer(model, encoder, replace(sample, turns=sample.turns[:1]), 32) == exercise.answer
    return right / count


def test_names_every_picture(checkpoint, model):
    assert exact(tasks.describe_each, 24, checkpoint, model) >= 0.9


def test_cannot_find_the_odd_one_out(checkpoint, model):
    assert exact(tasks.odd_one_out, 40, checkpoint, model) < 0.5


def test_a_seed_gives_the_same_rows_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "PICTURES_OF_A_THING", 2)
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        tasks.write(tmp_path / name, rows=6, held_out=3, seed=seed)
    one, two, other = (
        {f.relative_to(d): f.read_bytes() for f in d.rglob("*.*")}
        for d in map(tmp_path.joinpath, ("one", "two", "other"))
    )
    assert one == two
    assert one.keys() == other.keys() and not {*one.values()} & {*other.values()}


def test_rows_are_chat_data_and_the_splits_share_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "PICTURES_OF_A_THING", 2)
    tasks.write(tmp_path, rows=6, held_out=3, seed=0)
    rows = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").open()] for split in ("train", "held_out")
    }
    assert (len(rows["train"]), len(rows["held_out"])) == (6, 3)
    for row in (*rows["train"], *rows["held_out"]):
        question, reply = row["conversations"]
        assert question["value"].count("<image>") == len(row["images"]) == 4
        assert reply["value"] in {f"image {k}" for k in range(1, 5)}
        assert all((tmp_path / image).is_file() for image in row["images"])
    train, held_out = ({(tmp_path / i).read_bytes() for row in part for i in row["images"]} for part in rows.values())
    assert not train & held_out
