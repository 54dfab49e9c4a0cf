"""MVBench: frames by its rule from whatever holds a clip, answers as meant or as the original reads them, its hub."""

import json
import os
import subprocess
import sys
from zipfile import ZipFile

import benchmarks_made
import fake_hub
import numpy as np
import pytest
from clips_made import make, number_of

from mantis_lite.data.clips import Clips
from mantis_lite.data.frames import Frames
from mantis_lite.errors import DataError, SampleError
from mantis_lite.evaluate import mvbench
from mantis_lite.evaluate.question import Question

IN_A_PROCESS = """
import json, sys
from mantis_lite.errors import DataError
from mantis_lite.evaluate.asking import named, shown
from mantis_lite.evaluate.benchmarks import find
for name, source, protocol in json.loads(sys.argv[1]):
    try:
        found = [[q.id, q.answer, shown(q.sample), [named(i).rpartition("/")[2] for i in q.sample.images]]
                 for q in find(name).read(source, protocol)]
    except DataError as error:
        found = str(error)
    sys.__stdout__.write(json.dumps(found) + "\\n")
"""


def of_the_hub(tmp_path, url: str, asked: list) -> list:
    """What benchmarks' `read` gives in its own process: huggingface_hub reads HF_ENDPOINT when imported."""
    env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", IN_A_PROCESS, json.dumps(asked)]
    done = subprocess.run(command, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def task(folder, name: str, *rows: dict) -> str:
    """A copy with one task and its rows."""
    (folder / "json").mkdir(parents=True, exist_ok=True)
    made = [{"question": "What?", "candidates": ["up", "down"], "answer": "down"} | row for row in rows]
    (folder / "json" / f"{name}.json").write_text(json.dumps(made))
    return str(folder)


@pytest.mark.parametrize(
    ("said", "upstream"),
    [
        ("the answer is A, no: the answer is B", "B"),  # the last time that a lead is there
        ("answer: A. So the answer is C", "C"),  # the first of the leads
        ("the option is C", "C"),
        ("the option is:C", None),  # cut at a blank that is not there: "the"
        ("Final answer: C", "C"),
        ("The option is C", None),
        ("answer: b", None),
        ("A cat", "A"),
        ("\u00c9 B", None),  # a letter too
        ("D", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_originals_letter(said, upstream):
    asked = Question("1", None, "choice", "B", ("up", "down", "not"))
    assert mvbench.parse(said, asked, "upstream") == upstream


def test_of_two_candidates_alike_the_original_takes_the_last(tmp_path):
    (tmp_path / "video/ssv2_video").mkdir(parents=True)
    make(tmp_path / "video/ssv2_video/a.mp4")
    source = task(tmp_path, "action_antonym", {"video": "a.mp4", "candidates": ["down", "up", "down"]})
    assert [mvbench.read(source, protocol)[0].answer for protocol in ("own", "upstream")] == ["A", "C"]


def test_frames_are_counted_where_a_header_does_not(tmp_path):
    """Of a clip with a long picture the header's length and rate would tell more frames than there are."""
    clip = tmp_path / "video/ssv2_video/a.webm"
    clip.parent.mkdir(parents=True)
    make(clip, "libvpx", frames=40, stamps=[*range(20), *range(60, 80)])
    assert Clips().header(clip).frames > 40
    (asked,) = mvbench.read(task(tmp_path, "action_antonym", {"video": "a.webm"}), "own")
    wanted = mvbench.frame_numbers(None, None, 25, 0, 39, 8)
    assert [frame.at for frame in asked.sample.images] == wanted
    assert [number_of(np.asarray(picture)) for picture in Frames().open(asked.sample)] == wanted


def test_fewer_frames_than_are_taken(tmp_path):
    clip = tmp_path / "video/sta/sta_video/a.mp4"
    clip.parent.mkdir(parents=True)
    make(clip, frames=3)
    (asked,) = mvbench.read(task(tmp_path, "action_localization", {"video": "a.mp4", "start": 0, "end": 9}), "own")
    assert [frame.at for frame in asked.sample.images] == mvbench.frame_numbers(0, 9, 25, 0, 2, 8)
    assert len(Frames().open(asked.sample)) == 8


def test_late_clips_lie_in_an_archive_of_their_own(tmp_path):
    clip = make(tmp_path / "late.mp4")
    (tmp_path / "video/clevrer/video_validation").mkdir(parents=True)
    with ZipFile(tmp_path / "video/data0613.zip", "w") as archive:
        archive.write(clip, "data0613/clevrer/video_validation/late.mp4")
    (asked,) = mvbench.read(task(tmp_path, "moving_count", {"video": "late.mp4"}), "own")
    assert asked.sample.images[0].source.parts[-4:] == ("data0613", "clevrer", "video_validation", "late.mp4")


def test_rows_that_are_none_or_name_files_elsewhere(tmp_path):
    (tmp_path / "video/ssv2_video").mkdir(parents=True)
    outside = make(tmp_path / "outside.mp4")
    with pytest.raises(SampleError, match=r"action_antonym.json:1 .*: no clip .*\n  Fetch it, or take the task's file"):
        mvbench.read(task(tmp_path, "action_antonym", {"video": str(outside)}), "own")
    (tmp_path / "json/action_antonym.json").write_text('["a row"]')
    with pytest.raises(DataError, match=r"action_antonym.json: not a JSON list of rows\n  Fetch it again"):
        mvbench.read(str(tmp_path), "own")
    (tmp_path / "video/ssv2_video").rmdir()
    with pytest.raises(DataError, match=r"has no task's clips\n  They lie in video/, unpacked or in its .zip files"):
        mvbench.read(task(tmp_path, "action_antonym", {"video": "a.mp4"}), "own")
    folder = tmp_path / "video/tvqa/frames_fps3_hq/show"
    folder.mkdir(parents=True)
    with pytest.raises(SampleError, match=r"show has no .jpg in it\n  Fetch its frames"):
        mvbench.read(task(tmp_path, "episodic_reasoning", {"video": "show"}), "own")


@pytest.mark.slow
def test_the_hub(tmp_path):
    root = tmp_path / "hub/datasets/own/mvbench"
    copy = benchmarks_made.mvbench(root)
    with ZipFile(copy / "video/all.zip", "w") as archive:
        for file in sorted((copy / "video").rglob("*.*")):
            if file.is_file() and file.suffix != ".zip":
                archive.write(file, file.relative_to(copy / "video"))
    with fake_hub.FakeHub(tmp_path / "hub") as hub:

        class Gated(hub.server.RequestHandlerClass):
            def route(self, body):
                if "gated" in self.path:
                    raise fake_hub._Refused(403, "GatedRepo", "Access is restricted")
                super().route(body)

        hub.server.RequestHandlerClass = Gated
        sources = ("own/mvbench", str(copy), "own/gated", "own/none")
        fetched, local, gated, none = of_the_hub(tmp_path, hub.url, [("mvbench", each, "own") for each in sources])
        assert len(fetched) == 12 and fetched == local
        assert not any(file.endswith((".mp4", ".jpg")) for file in hub.requests), "only archives are fetched"
    remedy = "Accept its terms at https://huggingface.co/datasets/own/gated, and log in: hf auth login."
    assert gated == f"own/gated: is given only to those who accept its terms\n  {remedy}"
    assert none.startswith("own/none: no folder here, and not to be had from the hub: ")
