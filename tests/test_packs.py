"""The packs that memory goes by: their pictures, their supervised tokens, and what becomes of them under overrides."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers import chat, picture, recipe, write_rows

from mantis_lite.data.encode import IGNORE
from mantis_lite.data.schema import parse
from mantis_lite.memory.overrides import _candidates, best, changed, taken
from mantis_lite.memory.packs import assumed, grids_of
from mantis_lite.recipe_file import load_recipe, make_recipe
from mantis_lite.report.fit import read, work_of

SHAPES = [(640, 480), (480, 640), (1300, 200), (77, 333), (30, 30), (1001, 999)]


@pytest.mark.parametrize("splitting", [False, True])
def test_views_are_those_that_the_tower_is_given(checkpoint_of, splitting):
    encoder = checkpoint_of("idefics2").encoder(recipe(media={"image_splitting": splitting}))
    patch = checkpoint_of("idefics2").config.vision_config.patch_size
    for size in SHAPES:
        row = {"images": [{"bytes": picture(0, *size)}], "messages": [{"role": "user", "content": "?"}]}
        row["messages"].append({"role": "assistant", "content": "!"})
        (pixels,) = encoder.encode(parse(row, "rows:1", None)).pixels
        shapes = [tuple(side // patch for side in view.shape[-2:]) for view in pixels.values()]
        assert list(grids_of(encoder.vision, size)) == shapes and len(shapes) == (5 if splitting else 1)
        assert encoder.vision.patches(size) == sum(rows * columns for rows, columns in shapes)


def test_split_pictures_are_five_views_with_and_without_data(folder_of, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [chat("What is it?", "A dog.", images=(n, n + 1)) for n in range(3)])
    words = [f"model={folder_of('idefics2')}", "packing.max_length=4096", "media.image_splitting=true"]
    work = work_of(read("chat-idefics2-qlora", [f"data={rows}", *words]))
    (pack,), _ = work.rows.packs(read("chat-idefics2-qlora", [f"data={rows}", *words]))
    assert len(pack.grids) == 3 * 2 * 5
    without = read("chat-idefics2-qlora", words)
    vision = work_of(without).rows.vision(without)
    pack, _ = assumed(without, vision)
    latents = vision.placeholders((640, 480))
    assert len(pack.grids) == 5 * (4096 // (latents + 5)) and latents % 5 == 0


def test_supervised_tokens_are_those_of_the_encoder(family, folder_of, tmp_path):
    made = [chat("What is it?", f"It is number {n}.", "Sure?", "Yes.", images=(n,)) for n in range(4)]
    rows = write_rows(tmp_path / "rows.jsonl", made)
    settings = recipe(str(folder_of(family)), data=rows, packing={"max_length": 8192})
    work = work_of(settings)
    for pack in work.rows.packs(settings)[0]:
        encoded = [work.rows.encoder.encode(work.rows.samples[index]) for index in pack.members]
        assert pack.supervised == sum(int((each.labels != IGNORE).sum()) for each in encoded)
        assert pack.tokens == sum(map(len, encoded)) and pack.longest == max(map(len, encoded))


def test_smaller_pictures_are_measured_again(folder_of, tmp_path):
    """The override comes to what the recipe with it comes to, read anew."""
    model = shutil.copytree(folder_of("qwen2_vl"), tmp_path / "model")
    processor = json.loads((model / "preprocessor_config.json").read_text())
    processor["size"]["longest_edge"] = 10**7
    (model / "preprocessor_config.json").write_text(json.dumps(processor))
    pictures = [{"images": [{"bytes": picture(n, 640, 480)}]} for n in range(4)]
    rows = write_rows(tmp_path / "rows.jsonl", [chat("What is it?", "A dog.") | image for image in pictures])
    settings = {"model": str(model), "data": rows, "run_dir": "none", "method": "lora"}
    before = make_recipe(settings | {"packing": {"enabled": False}, "train": {"gradient_accumulation_steps": 1}})
    work = work_of(before)
    after = changed(before, "media.max_image_size=320")
    assert taken(work, after) == taken(work_of(after), after)
    assert taken(work, after)[0].pack.patches < taken(work, before)[0].pack.patches / 3
    assert "media.max_image_size=320" in [other.words for other in best(work, before, taken(work, before), 99)]


def test_fewer_frames_are_measured_again(folder_of, tmp_path):
    from clips_made import make

    make(tmp_path / "clip.mp4", frames=30)
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "!"}]
    row = json.dumps({"video": "clip.mp4", "conversations": turns})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 3)
    words = [f"model={folder_of('idefics2')}", f"data={tmp_path / 'rows.jsonl'}", "media.num_frames=8"]
    before = load_recipe("video-idefics2-lora", [*words, "packing=off", "train.gradient_accumulation_steps=1"])
    work = work_of(before)
    assert "media.num_frames=4" in list(_candidates(work, before))
    after = changed(before, "media.num_frames=4")
    assert taken(work, after) == taken(work_of(after), after)
    assert len(taken(work, after)[0].pack.grids) == 4


def test_shorter_packs_are_planned_again(folder_of, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [chat("What is it? " * 9, "A dog.", images=(n,)) for n in range(9)])
    settings = {"model": str(folder_of("llava")), "data": rows, "run_dir": "none", "packing": {"max_length": 512}}
    before = make_recipe(settings)
    work = work_of(before)
    after = changed(before, "packing.max_length=256")
    assert taken(work, after) == taken(work_of(after), after)
    lengths = work.rows.samples.lengths
    longest = replace(work.rows, held_out=replace(work.rows.samples, lengths=lengths + np.array([99, 0]))).longest
    assert longest == lengths[:, 0].max() + 99
    tight = changed(before, f"packing.max_length={work.rows.longest}")
    assert not any(words.startswith("packing") for words in _candidates(work_of(tight), tight))
