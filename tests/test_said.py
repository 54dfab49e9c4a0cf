"""What `check` says a second time: the same at once while all that it read is as it was, and else what there is now."""

import json
import os
import zipfile

import pytest
from clips_made import make
from helpers import chat, picture, recipe, write_rows
from typer.testing import CliRunner

from mantis_lite.cli import app
from mantis_lite.data.lengths import cache_dir
from mantis_lite.report.check import check
from mantis_lite.report.said import remember, remembered, said_of

ROWS = [chat("What? <image>", f"A thing, number {at}.", images=(at,)) for at in range(3)]


@pytest.fixture
def asked(folder_of, tmp_path):
    """A recipe of three rows with a picture each, two of them to train on."""
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS[:1])
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    model = tmp_path / "model"
    model.symlink_to(folder_of("llava"), target_is_directory=True)
    return recipe(model, data={"sources": path, "eval": held_out}, packing={"max_length": 2_000})


def checked(asked, quick=False):
    found = check(asked, not quick)
    said = said_of(found)
    remember(asked, quick, found, said)
    return said


def test_the_same_is_said_at_once(asked):
    assert remembered(asked, False) is None
    said = checked(asked)
    assert remembered(asked, False) == said and said.sample.startswith("rows.jsonl:1") and said.rendered
    assert remembered(asked, True) is None, "what was decoded is not what was only measured"


CHANGES = {
    "a picture": lambda folder: os.utime(folder / "rows-1-0.png", (1, 1)),
    "a held-out picture": lambda folder: os.utime(folder / "held_out-0-0.png", (1, 1)),
    "a picture is gone": lambda folder: (folder / "rows-2-0.png").unlink(),
    "the rows": lambda folder: (folder / "rows.jsonl").open("a").write("\n"),
    "the held-out rows": lambda folder: (folder / "held_out.jsonl").open("a").write("\n"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_is_read_again(asked, tmp_path, change):
    checked(asked)
    change(tmp_path)
    assert remembered(asked, False) is None


def test_what_decoding_read_is_what_rows_name(folder_of, tmp_path):
    """Pictures, clips, and frames in a folder with all that lies there; without decoding, the rows are asked."""
    make(tmp_path / "a.mp4")
    (tmp_path / "frames").mkdir()
    for at in range(5):
        (tmp_path / "frames" / f"{at}.png").write_bytes(picture(at))
    clips = [chat("<video>What?", "Blocks.", video=video) for video in ("a.mp4", "frames")]
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, *clips])
    asked = recipe(folder_of("llava"), data=path, task="video", media={"num_frames": 4}, packing={"max_length": 2_000})
    kept = []
    for decode in (True, False):
        found = check(asked, decode)
        assert not found.prepared.rejects and (found.files is not None) == decode
        remember(asked, False, found, said_of(found))
        (file,) = (cache_dir() / "checks").iterdir()
        kept.append(json.loads(file.read_text())["files"])
    assert kept[0] == kept[1] and str(tmp_path / "frames/4.png") in [name for name, *_ in kept[0]]
    assert len([name for name, *_ in kept[0] if name.startswith(str(tmp_path))]) == 1 + 3 + 1 + 1 + 5


def test_another_model_in_the_same_folder_is_read_again(asked, tmp_path, folder_of):
    checked(asked)
    (tmp_path / "model").unlink()
    (tmp_path / "model").symlink_to(folder_of("idefics2"), target_is_directory=True)
    assert remembered(asked, False) is None


def test_another_recipe_and_another_folder_are_others(asked, tmp_path, monkeypatch):
    checked(asked)
    other = asked.model_copy(update={"packing": asked.packing.model_copy(update={"max_length": 1_000})})
    assert remembered(other, False) is None
    monkeypatch.chdir(tmp_path)  # relative paths mean other files there
    assert remembered(asked, False) is None


def test_what_is_wrong_with_rows_is_looked_for_every_time(asked, tmp_path):
    (tmp_path / "rows-1-0.png").write_bytes((tmp_path / "rows-1-0.png").read_bytes()[:-600])
    assert "1 rejected" in checked(asked).rows[0] and remembered(asked, False) is None


def test_nothing_is_kept_of_pictures_in_an_archive(folder_of, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in tmp_path.glob("*.png"):
            archive.write(file, file.name)
    asked = recipe(folder_of("llava"), data={"sources": [{"path": path, "media_dir": str(tmp_path / "pictures.zip")}]})
    assert "3 to train on" in checked(asked).rows[0] and remembered(asked, False) is None


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"said": {}, "files": []})])
def test_what_is_kept_and_broken_is_as_if_it_were_not_there(asked, content):
    checked(asked)
    (kept,) = (cache_dir() / "checks").iterdir()
    kept.write_text(content)
    assert remembered(asked, False) is None


def test_a_cache_that_cannot_be_written_is_done_without(asked, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MANTIS_LITE_CACHE", str(tmp_path / "file"))
    said_before = said_of(check(asked))
    remember(asked, False, check(asked), said_before)
    assert remembered(asked, False) is None


def test_the_command_says_the_same_and_when_it_was_found(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    words = ["check", "chat", f"data={path}", "model=tiny"]
    first, again = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == again.exit_code == 0 and "3 rows read" in first.stdout
    last = again.stdout.splitlines()[-1]
    assert again.stdout == first.stdout + last + "\n" and "no file that was read then has changed" in last
