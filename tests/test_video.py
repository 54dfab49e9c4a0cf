"""Rows with clips: every spelling, which frames are taken, what the model gets, and what the original got."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clips_made import make, number_of
from helpers import SHARED, by_size, numbers_of, recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from typer.testing import CliRunner

from mantis_lite.cli import app
from mantis_lite.data.collate import collate
from mantis_lite.data.content import content_of
from mantis_lite.data.encode import IGNORE
from mantis_lite.data.frames import Frames, upstream_indices
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.prepare import prepare
from mantis_lite.data.sample import Frame, Image, Sample, Turn, Video
from mantis_lite.data.schema import parse
from mantis_lite.errors import DataError, SampleError
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import load_model
from mantis_lite.recipe import DataRecipe, MediaRecipe, PackingRecipe, SourceRecipe

ROOT = Path("/data")
A, B = Video(ROOT / "a.mp4"), Video(ROOT / "b.mp4")
P, Q = Image(ROOT / "p.jpg"), Image(ROOT / "q.jpg")
REAL = SHARED / "data/mantis-examples/chat_video"
GOLDEN = SHARED / "golden"
VIDEO = {"task": "video", "media": {"num_frames": 4}}


def row(*texts, **columns) -> dict:
    roles = ("user", "assistant")
    return columns | {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


def read(found, task="video") -> Sample:
    return parse(found, "train.json:7", MediaFolder(ROOT), task)


def asked(found, task="video") -> tuple:
    return read(found, task).turns[0].content


@pytest.mark.parametrize("turns", ["conversation", "conversations", "messages"])
@pytest.mark.parametrize(
    ("speaker", "text", "user", "assistant"),
    [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")],
)
@pytest.mark.parametrize(
    "columns",
    [
        {"video": "a.mp4"},
        {"videos": ["a.mp4"]},
        {"videos": "a.mp4"},
        {"video": ["a.mp4"]},
        {"video": {"path": "a.mp4"}},
    ],
)
def test_every_spelling_is_the_same_sample(turns, speaker, text, user, assistant, columns):
    found = columns | {"id": 3, turns: [{speaker: user, text: "<video>Hi"}, {speaker: assistant, text: "Ho"}]}
    assert read(found) == read(row("<video>Hi", "Ho", id="3", video="a.mp4"))


@pytest.mark.parametrize(
    ("found", "content"),
    [
        (row("What?", "x", video="a.mp4"), (A, "What?")),
        (row("What?<video>", "x", video="a.mp4"), ("What?", A)),
        (row("<video> or <video>?", "x", videos=["a.mp4", "b.mp4"]), (A, " or ", B, "?")),
        (row("or <video>?", "x", videos=["a.mp4", "b.mp4"]), (A, "or ", B, "?")),
        (row("Like <image>?<video>", "x", video="a.mp4", image="p.jpg"), ("Like ", P, "?", A)),
        (row("What?", "x", video="a.mp4", image="p.jpg"), (A, P, "What?")),
        (row("<image>\nWhat?", "x", video="a.mp4"), (A, "\nWhat?")),
        (row("What?", "x", images=["p.jpg", "q.jpg"]), (Video((P, Q)), "What?")),
        (row("Is <video> new?", "x", images=["p.jpg", "q.jpg"]), ("Is ", Video((P, Q)), " new?")),
        (row("<image> or <image>", "x", images=["p.jpg", "q.jpg"]), (P, " or ", Q)),
        (row("What?", "x"), ("What?",)),
        (row("HTML's <image>", "x"), ("HTML's <image>",)),
        (
            row("What?", "x", video={"video": "a.mp4", "start": 1, "end": 2.5}),
            (replace(A, start=1.0, end=2.5), "What?"),
        ),
        (row("What?", "x", videos=[["p.jpg", "q.jpg"], "a.mp4"]), (Video((P, Q)), A, "What?")),
        (row([{"type": "text", "text": "What?"}, {"type": "video", "video": "a.mp4"}], "x"), ("What?", A)),
        (row([{"type": "video"}, {"type": "text", "text": "What?"}], "x", video="a.mp4"), (A, "What?")),
        (row([{"type": "video_url", "video_url": {"url": "a.mp4"}, "end": 3}], "x"), (replace(A, end=3.0),)),
        (row([{"type": "video", "video": ["p.jpg", "q.jpg"]}], "x"), (Video((P, Q)),)),
        (row([{"type": "text", "text": "a <video> b"}, "<video>"], "x", videos=["a.mp4", "b.mp4"]), ("a ", A, " b", B)),
        (row([{"type": "text", "text": "HTML's <image>"}], "x"), ("HTML's <image>",)),
        (row("What?", "x", video="a.mp4", start=1, end=2.5), (replace(A, start=1.0, end=2.5), "What?")),
        (row("x", "x", videos=[{"path": "a.mp4", "start": 2}], end=3), (replace(A, start=2.0, end=3.0), "x")),
        (row("What?", "x", video=None, videos=[]), ("What?",)),
    ],
)
def test_where_clips_go(found, content):
    assert asked(found) == content


def test_what_was_read_otherwise_is_said():
    assert read(row("<image>\nWhat?", "x", video="a.mp4")).notices == (
        '"<image>" was read as the place of a clip, as the row has no picture',
    )
    assert read(row("HTML's <image>", "x")).notices == ('"<image>" was read as text, as the row has no picture',)


def test_a_mark_of_a_later_turn_is_kept_there():
    sample = read(row("One?", "x", "<video>Two?", "y", videos=["a.mp4", "b.mp4"]))
    assert [turn.content for turn in sample.turns] == [(A, "One?"), ("x",), (B, "Two?"), ("y",)]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            row("<video><video>", "x", video="a.mp4"),
            "1 video but 2 <video> marks in the turns\n  Add the clip or",
        ),
        (row([{"type": "text", "text": "a <video>"}], "x"), "0 videos but 1 <video> mark in the turns"),
        (row([{"type": "video", "video": "a.mp4"}, "<video>"], "x"), "0 videos but 1 <video> mark in the turns"),
        (row("x", "x", video=""), '"video" is an empty path'),
        (row("x", "x", video=False), '"video" is true or false'),
        (row("x", "x", video={"path": "a.mp4", "bytes": b"x"}), '"video" is given as bytes\n  Write them to a file'),
        (row("x", "x", videos=["a.mp4", "b.mp4"], start=1), '"start" or "end" beside several clips of "videos"'),
        (row("<video>", "x"), "0 videos but 1 <video> mark in the turns"),
        (row("<image><image>", "x", video="a.mp4", image="p.jpg"), "1 image but 2 <image> marks in the turns"),
        (row("<image> <video>", "x", images=["p.jpg"]), "0 videos but 1 <video> mark in the turns"),
        (row("x", "x", video="http://a/b.mp4"), "\"video\" is a link ('http://a/b.mp4')\n  Download the clip"),
        (row("x", "x", videos=["a.mp4", ""]), '"videos"[1] is an empty path\n  Give the file'),
        (row("x", "x", video=3), '"video" is a number\n  Give a path, a list of frames, or {"path"'),
        (row("x", "x", video="a.mp4", videos=["b.mp4"]), '"video" and "videos" name other clips'),
        (row("x", "x", video={"path": "a.mp4", "start": -1}), '"start" of "video" is -1\n  Give seconds'),
        (row("x", "x", video={"path": "a.mp4", "end": True}), '"end" of "video" is True\n  Give seconds'),
        (row("x", "x", video={"path": "a.mp4", "end": "2"}), '"end" of "video" is \'2\'\n  Give seconds'),
        (row("x", "x", video={"path": "a.mp4", "start": 2, "end": 2}), '"video" ends at 2 s, no later than it starts'),
        (row("x", "x", videos=[{"path": ["p.jpg"], "start": 2}]), '"videos"[0] has a start or end, and frames have no'),
        (row("x", "x", videos=[[3]]), 'frame 1 of "videos"[0] is a number'),
        (row([{"type": "sound"}], "x"), "part 1 of turn 1 has the type 'sound'\n  Here are read text, image"),
        (
            row([{"type": "video", "video": "a.mp4"}], "x", video="b.mp4"),
            "1 video beside the turns but 0 marks for them",
        ),
        ({"video": "a.mp4"}, 'none of "conversation", "conversations" and "messages"'),
        ({"prompt": "x", "labels": {"a": 1}}, "this is a classification row"),
    ],
)
def test_what_is_wrong_with_a_row(found, message):
    with pytest.raises(SampleError) as caught:
        read(found)
    assert str(caught.value).startswith(f"train.json:7: {message}")


# Which frames.


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """100 frames at 25 a second: 4 s."""
    return make(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=100)


def sample_of(*videos: Video) -> Sample:
    return Sample("rows:1", "7", (Turn("user", (*videos, "?")), Turn("assistant", ("yes",))))


def frames_of(media: dict, *videos: Video) -> tuple:
    return Frames(MediaRecipe(**media)).lay_out(sample_of(*videos)).turns[0].content[:-1]


def numbers(media: dict, *videos: Video) -> list[int]:
    """The numbers that the pictures themselves hold."""
    frames = Frames(MediaRecipe(**media))
    return [number_of(np.asarray(picture)) for picture in frames.open(frames.lay_out(sample_of(*videos)))]


@pytest.mark.parametrize(
    ("media", "times"),
    [
        ({"num_frames": 4}, [0.5, 1.5, 2.5, 3.5]),
        ({"num_frames": 1}, [2.0]),
        ({"fps": 1.0, "max_frames": 8}, [0.5, 1.5, 2.5, 3.5]),
        ({"fps": 5.0, "max_frames": 4}, [0.5, 1.5, 2.5, 3.5]),
        ({"fps": 0.1, "max_frames": 4}, [2.0]),
        ({"num_frames": 2, "start": 1.0}, [1.75, 3.25]),
        ({"num_frames": 2, "start": 1.0, "end": 2.0}, [1.25, 1.75]),
        ({"num_frames": 2, "end": 60.0}, [1.0, 3.0]),
    ],
)
def test_frames_are_spread_over_the_whole_clip(clip, media, times):
    frames = frames_of(media, Video(clip))
    assert [frame.at for frame in frames] == pytest.approx(times)
    assert {frame.size for frame in frames} == {(96, 64)}
    assert numbers(media, Video(clip)) == [int(time * 25 + 1e-6) for time in times]


def test_a_row_s_own_start_and_end_go_before_the_recipe_s(clip):
    own = frames_of({"num_frames": 2, "start": 3.0}, Video(clip, start=1.0, end=2.0))
    assert [frame.at for frame in own] == pytest.approx([1.25, 1.75])
    rounded = frames_of({"num_frames": 1}, Video(clip, start=3.0, end=4.6))
    assert [frame.at for frame in rounded] == pytest.approx([3.5])


@given(count=st.integers(1, 120))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_exactly_so_many_frames_and_each_once(clip, count):
    times = [frame.at for frame in frames_of({"num_frames": count}, Video(clip))]
    assert len(times) == min(count, 100)
    assert len({int(time * 25) for time in times}) == len(times)


@pytest.mark.parametrize(
    ("total", "most", "fps", "kept"),
    [
        (33, 32, None, 17),
        (40, 32, None, 20),
        (65, 32, None, 22),
        (100, 32, None, 25),
        (64, 32, None, 32),
        (32, 32, None, 32),
    ],
)
def test_how_many_frames_upstream_keeps(total, most, fps, kept):
    assert len(upstream_indices(total, most, fps, 25.0)) == kept


def test_upstream_takes_whole_strides(clip):
    media = {"num_frames": 32, "sampling": "upstream"}
    assert [frame.at for frame in frames_of(media, Video(clip))] == list(range(0, 100, 4))
    assert numbers({"fps": 5.0, "max_frames": 4, "sampling": "upstream"}, Video(clip)) == [0, 5, 10, 15]


def folder_of(folder: Path, count: int, name="frame_{}.png") -> Path:
    folder.mkdir()
    for at in range(count):
        PILImage.new("RGB", (20 + at, 16), (at, at, at)).save(folder / name.format(at))
    (folder / ".hidden").write_text("x")
    return folder


@pytest.mark.parametrize(
    ("media", "expected"),
    [
        ({}, range(12)),
        ({"num_frames": 20}, range(12)),
        ({"num_frames": 5}, [1, 3, 6, 8, 10]),
        ({"fps": 1.0, "max_frames": 2}, [3, 9]),
        ({"num_frames": 5, "sampling": "upstream"}, [0, 2, 4, 7, 9]),
    ],
)
def test_a_folder_of_frames_is_in_the_order_of_its_numbers(tmp_path, media, expected):
    """Of 12, so that 10 does not come before 2."""
    folder = folder_of(tmp_path / "clip", 12)
    assert [image.source.stem for image in frames_of(media, Video(folder))] == [f"frame_{at}" for at in expected]
    for total, most in ((17, 7), (21, 15), (34, 7), (15, 13)):  # where a step of floats lands on the end, or near it
        many = Video(tuple(Image(Path(f"{at}.png")) for at in range(total)))
        assert len(frames_of({"num_frames": most, "sampling": "upstream"}, many)) == most
    listed = tuple(Image(folder / f"frame_{at}.png") for at in range(12))
    assert frames_of(media, Video(listed)) == frames_of(media, Video(folder))


def test_frames_are_named(clip, tmp_path):
    labelled = frames_of({"num_frames": 2, "frame_label": "{time:.1f}s "}, Video(clip))
    assert labelled[::2] == ("1.0s ", "3.0s ") and all(isinstance(part, Frame) for part in labelled[1::2])
    folder = folder_of(tmp_path / "clip", 2)
    assert frames_of({"frame_label": "frame {number}: "}, Video(folder))[::2] == ("frame 1: ", "frame 2: ")
    scored = Frames(MediaRecipe(num_frames=2), gap=" ").lay_out(sample_of(Video(clip)))
    assert [part for part in scored.turns[0].content if isinstance(part, str)] == [" ", "?"]


def test_what_cannot_be_laid_out_names_the_row(clip, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    odd = folder_of(tmp_path / "odd", 2, "frame{}x.png")
    twice = folder_of(tmp_path / "twice", 1, "a_{}.png")
    (twice / "b_0.png").write_bytes(b"")
    cases = [
        (
            {},
            Video(clip),
            "clip.mp4 is a clip, and the recipe does not say how many of its frames to take\n  Set media.num",
        ),
        ({"num_frames": 2}, Video(clip, start=4.0), f"{clip} lasts 4.0 s, and is to start at 4\n  Mend the start."),
        ({"num_frames": 2}, Video(clip, end=6.0), f"{clip} lasts 4.0 s, and is to end at 6\n  Mend the end."),
        ({"num_frames": 2, "end": 1.0}, Video(clip, start=2.0), "a clip is to start at 2 s and to end at 1\n  Mend"),
        ({"num_frames": 2}, Video(odd, end=1.0), f"{odd} is a folder of frames, which have no times"),
        ({"num_frames": 2}, Video(odd), f"the files in {odd} are not numbered frames: invalid literal"),
        ({"num_frames": 2}, Video(empty), f"{empty} has no frames in it"),
        (
            {"num_frames": 2},
            Video(twice),
            f"{twice} has 2 files with 1 numbers\n  Give each frame a number of its own.",
        ),
        ({"num_frames": 2}, Video(tmp_path / ("x" * 300)), f"{tmp_path / ('x' * 300)} cannot be read: "),
        (
            {"num_frames": 2},
            Video(odd / "frame0x.png"),
            f"{odd / 'frame0x.png'} cannot be read: is a picture, not a clip",
        ),
        ({"num_frames": 2}, Video(tmp_path / "no.mp4"), f"no such file: {tmp_path / 'no.mp4'}\n  A path in a row"),
        (
            {"frame_label": "{time}"},
            Video((Image(tmp_path / "x.png"),)),
            "media.frame_label tells times, and frames that are pictures have none\n  Set media.frame_label to",
        ),
        (
            {"num_frames": 2, "sampling": "upstream"},
            Video(clip, end=2.0),
            "a clip has a start or end, and media.sampling=upstream takes whole clips\n  Set media.sampling=uniform.",
        ),
    ]
    for media, video, message in cases:
        with pytest.raises(SampleError) as caught:
            frames_of(media, video)
        assert str(caught.value).startswith(f'rows:1 (id "7"): {message}')


# What the model gets.


def test_measure_is_the_length_of_encode(checkpoint_of, family, clip, tmp_path):
    """By the header alone; and a clip's frames are what the same pictures would be."""
    media = {"num_frames": 3, "max_image_size": 60, "frame_label": "{number}: "}
    encoder = checkpoint_of(family).encoder(recipe(task="video", media=media))
    sample = sample_of(Video(clip), Image(clip.parent / "still.png"))
    PILImage.new("RGB", (50, 40), (9, 90, 200)).save(clip.parent / "still.png")
    (length,) = encoder.measure([sample])
    encoded = encoder.encode(sample)
    assert (length.tokens, length.images) == (len(encoded), 4) and len(encoded.pixels) == 4
    pictures = encoder.frames.open(encoder.frames.lay_out(sample), encoder.max_image_size)
    parts = []
    for at, picture in enumerate(pictures):
        picture.save(tmp_path / f"{at}.png")
        parts += [f"{at + 1}: "] * (at < 3) + [Image(tmp_path / f"{at}.png")]
    same = encoder.encode(sample_of(*parts))
    assert same.input_ids.tolist() == encoded.input_ids.tolist()
    for one, other in zip(same.pixels, encoded.pixels, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_model_takes_a_clip(checkpoint_of, family, clip):
    checkpoint = checkpoint_of(family)
    encoder = checkpoint.encoder(recipe(task="video", media={"num_frames": 3}))
    batch = collate([encoder.encode(sample_of(Video(clip))), encoder.encode(sample_of())], encoder.vision.batch)
    with torch.no_grad():
        assert load_model(checkpoint, recipe())(**batch).loss.isfinite()


def prepared(path: Path, rows: list[dict], media: dict, **data):
    path.write_text(json.dumps(rows))
    encoder = by_size(frames=Frames(MediaRecipe(**media)))
    sources = DataRecipe(sources=[SourceRecipe(path=str(path))], outside=True, **data)
    return prepare(sources, PackingRecipe(), encoder, task="video")


def test_lengths_of_clips_are_remembered_and_notices_with_them(clip, tmp_path, monkeypatch):
    short = make(tmp_path / "short.mp4", frames=2)
    folder = folder_of(tmp_path / "frames", 3)
    rows = [row("x", "y", video=str(path)) for path in (clip, short, folder)]
    first = prepared(tmp_path / "rows.json", rows, {"num_frames": 4})
    assert first.train.images.tolist() == [4, 2, 3]
    assert first.notices == {"a clip has fewer frames than media.num_frames: all were taken": 2}
    monkeypatch.setattr("mantis_lite.data.frames.Frames.lay_out", None)  # opened, it would fail
    again = prepared(tmp_path / "rows.json", rows, {"num_frames": 4})
    assert again.train.lengths.tolist() == first.train.lengths.tolist() and again.notices == first.notices
    monkeypatch.undo()
    other = prepared(tmp_path / "rows.json", rows, {"fps": 1.0, "max_frames": 2, "end": 3.0})
    assert other.train.images.tolist() == [2, 1, 2]
    assert other.notices == {
        "frames that are pictures have no times: media.max_frames of them were taken, whatever media.fps is": 1,
        "frames that are pictures have no times: all were taken, whatever media.start and media.end are": 1,
    }


def test_a_key_changes_with_a_clip_s_file_its_part_and_a_folder_s_frames(clip, tmp_path):
    folder = folder_of(tmp_path / "frames", 3)
    videos = [Video(clip), Video(clip, start=1.0), Video(clip, end=1.0), Video(folder), Video((Image(clip),))]
    keys = {content_of(sample_of(video)).key for video in videos}
    assert len(keys) == 5 and None not in keys
    (folder / "frame_3.png").write_bytes((folder / "frame_0.png").read_bytes())
    assert content_of(sample_of(Video(folder))).key not in keys
    assert content_of(sample_of(Video(tmp_path / "no.mp4"))) is None


def test_a_digest_is_a_copy_s_as_well_and_changes_with_a_folder_s_frames(tmp_path):
    folder = folder_of(tmp_path / "frames", 3)
    found = content_of(sample_of(Video(folder)))
    copied = content_of(sample_of(Video(Path(shutil.copytree(folder, tmp_path / "there/frames")))))
    assert copied.digest == found.digest and copied.key != found.key
    sorted(folder.iterdir())[1].unlink()
    assert content_of(sample_of(Video(folder))).digest != found.digest


def test_a_bad_clip_is_a_bad_row_like_any_other(clip, tmp_path):
    (tmp_path / "text.mp4").write_text("no clip")
    rows = [row("x", "y", video=str(path)) for path in [clip] * 3 + [tmp_path / "text.mp4"]]
    found = prepared(tmp_path / "rows.json", rows, {"num_frames": 4}, on_bad_row="skip")
    (reject,) = found.rejects
    assert reject.where == "rows.json:4" and reject.found.startswith(
        f"{tmp_path / 'text.mp4'} cannot be read: not a video"
    )
    with pytest.raises(SampleError, match=r"rows.json:4: .*text.mp4 cannot be read: not a video"):
        prepared(tmp_path / "rows.json", rows, {"num_frames": 4})


def test_too_many_frames_for_a_pack_say_what_to_do(clip, tmp_path):
    with pytest.raises(DataError) as caught:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([row("x", "y", video=str(clip))]))
        encoder = by_size(frames=Frames(MediaRecipe(num_frames=8)))
        data = DataRecipe(sources=[SourceRecipe(path=str(path))], outside=True)
        prepare(data, PackingRecipe(max_length=99), encoder, task="video")
    assert "(8 images); packing.max_length is 99\n  Raise packing.max_length, take fewer frames of a clip, or" in str(
        caught.value
    )


def test_media_may_lie_in_another_folder(clip, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([row("x", "y", video=clip.name)]))
    source = SourceRecipe(path=str(tmp_path / "rows.json"), media_dir=str(clip.parent))
    encoder = by_size(frames=Frames(MediaRecipe(num_frames=2)))
    assert len(prepare(DataRecipe(sources=[source]), PackingRecipe(), encoder, task="video").train) == 1
    config = tmp_path / "data_config.yaml"
    folder = clip.parent
    config.write_text(f"data: [{{path: rows.json, type: json, format: chat_video, split: train, video_dir: {folder}}}]")
    listed = DataRecipe(sources=[SourceRecipe(path=str(config))])
    assert len(prepare(listed, PackingRecipe(), encoder, task="video").train) == 1
    with pytest.raises(DataError, match="format: chat_video belongs to task=video; here is read chat"):
        prepare(listed, PackingRecipe(), encoder)


def test_a_clip_that_breaks_when_decoded_is_named_by_its_row(tmp_path):
    """Its header is whole and its data is cut: found in a step, skipped there like a broken picture."""
    whole = make(tmp_path / "whole.mp4", frames=50, muxer={"movflags": "faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    frames = Frames(MediaRecipe(num_frames=4))
    laid_out = frames.lay_out(sample_of(Video(cut)))
    with pytest.raises(SampleError, match=r'rows:1 \(id "7"\): .*cut.mp4 cannot be read: '):
        frames.open(laid_out)


# The original's.


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real rows are not beside this checkout")
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_real_clips_train_end_to_end(tmp_path, method, folder_of):
    model = GOLDEN / "checkpoints/idefics2" if GOLDEN.exists() else folder_of("idefics2")
    words = ["train", "video", f"data={REAL / 'train.json'}", f"model={model}", f"run_dir={tmp_path / 'run'}"]
    words += [f"method={method}", "train.num_train_epochs=2", "train.learning_rate=3e-3", "train.samples_per_step=3"]
    told_of = CliRunner().invoke(app, words)
    assert isinstance(told_of.exception, SampleError) and told_of.exception.exit_code == 3
    assert str(told_of.exception).startswith('train.json:1 (id "videochat1_6"): no such file: ')
    done = CliRunner().invoke(app, [*words, "data.on_bad_row=skip"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "11 rows read, 10 to train on, 1 rejected, 0 dropped as larger than a pack" in done.output
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert losses[-1] < losses[0] - 0.05
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def golden_cases() -> list[tuple[str, str]]:
    names = ("idefics2", "mllava_siglip_llama3")
    files = {name: GOLDEN / f"forward/video_{name}.json" for name in names}
    return [
        (name, case) for name, file in files.items() if file.is_file() for case in json.loads(file.read_text())["cases"]
    ]


@pytest.fixture(scope="module")
def golden():
    def get(name, case):
        record = json.loads((GOLDEN / f"forward/video_{name}.json").read_text())["cases"][case]
        with np.load(GOLDEN / f"forward/video_{name}.npz") as arrays:
            return record, {key.partition("/")[2]: arrays[key] for key in arrays if key.startswith(f"{case}/")}

    return get


@pytest.mark.skipif(not golden_cases(), reason="the golden fixtures are not beside this checkout")
@pytest.mark.parametrize(("name", "case"), golden_cases())
def test_frames_pixels_and_prompt_of_the_original(golden, name, case):
    """Its frames and its ids; `<video>`, which it leaves in the text, is put there for the comparison.

    Its labels for LLaVA are shifted by the words around each frame, as it masks a prompt tokenised without pictures
    (golden README, oddity 1): ours are the answers, and nothing else.
    """
    record, arrays = golden(name, case)
    kwargs = record["kwargs"]
    media = {"num_frames": kwargs["max_num_frames"]}
    if "fps" in kwargs:
        media = {"fps": float(kwargs["fps"]), "max_frames": kwargs["max_num_frames"]}
    settings = recipe(
        GOLDEN / "checkpoints" / name, task="video", media=media | {"sampling": "upstream"}, method="full"
    )
    checkpoint = open_checkpoint(settings.model)
    encoder = checkpoint.encoder(settings)
    found = dict(record["sample"])
    found["conversation"] = found["conversation"][:6]
    sample = parse(found, "golden:1", MediaFolder(REAL), "video")
    assert sample.turns[0].content[0] == Video(REAL / found["video"])
    laid_out = encoder.frames.lay_out(sample)
    assert [image.at for image in laid_out.images] == record["frame_indices"]
    pictures = encoder.frames.open(laid_out)
    assert [picture.size for picture in pictures] == [tuple(record["frame_size"])] * record["n_frames_used"]
    assert [hashlib.sha256(np.asarray(p).tobytes()).hexdigest() for p in pictures] == record["frame_rgb_sha256"]
    encoded = encoder.encode(with_literal_mark(sample, record["prompt"]))
    pixels = np.concatenate(
        [
            np.stack(list(picture.values())).reshape(1, 3, *next(iter(picture.values())).shape[-2:])
            for picture in encoded.pixels
        ]
    )
    pixels = pixels[None] if name == "idefics2" else pixels
    pixels = numbers_of(pixels, checkpoint.image_processor)
    assert list(pixels.shape) == record["pixel_values"]["shape"]
    assert hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() == record["pixel_values"]["sha256_fp32"]
    each = encoder.vision.tokens((56, 56))[-1][1]
    ids = encoded.input_ids.tolist()
    if name != "idefics2":
        ids = without_repeats(ids, encoder.token_id("<image>"), each)
    assert ids == arrays["input_ids"].ravel().tolist()
    ours = encoder.tokenizer.decode(encoded.input_ids[encoded.labels != IGNORE].tolist(), skip_special_tokens=True)
    answers = [turn["content"] for turn in found["conversation"][1::2]]
    assert ours.replace(" ", "") == "".join(answers).replace(" ", "")
    if name == "mllava_siglip_llama3":
        assert "<Image>" in record["decoded_label_tokens"]  # the defect


def with_literal_mark(sample: Sample, prompt: str) -> Sample:
    """Where its random generator put the literal mark."""
    video, text = sample.turns[0].content
    text = f"{text} <video>" if f"{text} <video>" in prompt else f"<video> {text}"
    return replace(sample, turns=(Turn("user", (video, text)), *sample.turns[1:]))


def without_repeats(ids: list[int], image: int, each: int) -> list[int]:
    kept, at = [], 0
    while at < len(ids):
        kept.append(ids[at])
        at += each if ids[at] == image else 1
    return kept
