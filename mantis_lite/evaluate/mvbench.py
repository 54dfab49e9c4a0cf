"""MVBench: twenty kinds of questions that a single frame of a clip cannot answer (Li et al. 2024, arXiv:2311.17005)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

from ..data.archives import misnamed, unpack
from ..data.clips import ClipError, Clips
from ..data.columns import Fault, short
from ..data.sample import Frame, Image, Sample, Turn
from ..errors import DataError, SampleError
from .benchmark import Benchmark
from .mantis_rows import LETTER_ALONE, right
from .parsing import choice
from .question import Protocol, Question

FRAMES = 8
FOLDER_RATE = 3
"""Frames a second of clips that are folders of pictures, numbered from 1."""
REVISIONS: dict[Protocol, str] = {"own": "main", "upstream": "5461410310c8d69b5d63e664bfc5d76dab90054c"}
"""The original's still has the clips of NTU RGB+D, which are to be asked for elsewhere now."""

FOLDERS = {
    "action_antonym": "ssv2_video",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
"""Where the clips of each task are, under video/ or in its archives."""

LEADS = ("the answer is", "answer:", "the option is ")
"""What the original looks for, in this order and as it is written here."""

log = logging.getLogger("mantis_lite")


def read(source: str, protocol: Protocol) -> list[Question]:
    """The questions of a folder, json/ and video/ as on the hub, or of the hub. Raises SampleError, DataError.

    Tasks are left out none of whose clips are there, and a warning says so.
    """
    folder = Path(source) if Path(source).exists() else _fetched(source, REVISIONS[protocol])
    roots = [folder / "video", *_unpacked(folder / "video")]
    files = {task: folder / "json" / f"{task}.json" for task in FOLDERS}
    files = {task: file for task, file in files.items() if file.is_file()}
    if not files:
        raise DataError(f"{source}: has no json/ with a task's rows\n  As on the hub, there is a file for each task.")
    absent = [task for task in files if not any((root / FOLDERS[task]).is_dir() for root in roots)]
    if absent:
        log.warning("mvbench: left out, as their clips are not here: %s", ", ".join(absent))
    with closing(Clips()) as clips:
        found = [q for task in files if task not in absent for q in _task(task, files[task], roots, clips, protocol)]
    if not found:
        raise DataError(f"{source}: has no task's clips\n  They lie in video/, unpacked or in its .zip files.")
    return found


def frame_numbers(start: float | None, end: float | None, rate: float, first: int, last: int, count: int) -> list[int]:
    """The frames that the benchmark takes of a clip, or of its part from `start` to `end` in s: `count`, evenly spread.

    >>> frame_numbers(None, None, 25, 0, 99, 8)
    [6, 18, 31, 43, 56, 68, 80, 93]
    """
    begin = max(first, round((-100_000 if start is None else start) * rate))
    stop = min(round((100_000 if end is None else end) * rate), last)
    share = (stop - begin) / count
    return [int(begin + share / 2 + np.round(share * at)) for at in range(count)]


def parse(raw: str, question: Question, protocol: Protocol) -> str | None:
    """The letter; as the original, the first of the alphabet's behind the last of a lead, if it is a capital.

    TIGER-AI-Lab/Mantis, mantis/benchmark/eval_on_mvbench.py at 3356142.
    """
    if protocol == "own":
        return choice(raw, question.options)
    # Its third lead is found without the blank that it is cut at.
    lead = next((lead for lead in LEADS if lead.rstrip() in raw), None)
    text = raw.split(lead)[-1] if lead else raw
    found = next((sign for sign in text if sign.isalpha()), None)
    return found if found in set(question.letters) else None


def _task(task: str, file: Path, roots: Sequence[Path], clips: Clips, protocol: Protocol) -> Iterator[Question]:
    try:
        rows = json.loads(file.read_text())
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: not a JSON list of rows\n  Fetch it again.")
    for number, row in enumerate(rows, 1):
        where, name = f"{file.name}:{number}", f"{task}-{number}"
        try:
            options, answer = _choices(row, protocol)
            frames = _frames(row, [root / FOLDERS[task] for root in roots], clips)
            lines = "".join(f"{letter}. {text}\n" for letter, text in zip(ascii_uppercase, options, strict=False))
            turn = Turn("user", (*frames, f"Question: {row['question']}\n{lines}{LETTER_ALONE}"))
        except KeyError as error:
            raise SampleError(where, f"no {error}", "Give the benchmark's own columns.", name) from None
        except Fault as fault:
            raise SampleError(where, fault.found, fault.remedy, name) from None
        yield Question(name, Sample(where, name, (turn,)), "choice", answer, options, task)


def _choices(row: Mapping[str, Any], protocol: Protocol) -> tuple[tuple[str, ...], str]:
    """The options, and the letter of the right one, by its text; of two alike, the original's is the last."""
    options = tuple(map(str, row["candidates"]))
    same = [letter for letter, text in zip(ascii_uppercase, options, strict=False) if text == str(row["answer"])]
    if not same:
        raise Fault(f"the answer {short(row['answer'])} is none of the candidates", "Mend the row.")
    return options, same[-1 if protocol == "upstream" else 0]


def _frames(row: Mapping[str, Any], folders: Sequence[Path], clips: Clips) -> list[Image]:
    name = str(row["video"])
    path = None if misnamed(name) else next((folder / name for folder in folders if (folder / name).exists()), None)
    if path is None:
        raise Fault(f"no clip {short(name)} in {folders[0]}", "Fetch it, or take the task's file away.")
    bounds = row.get("start"), row.get("end")
    if path.is_dir():
        count = sum(1 for file in path.iterdir() if file.suffix == ".jpg")
        if not count:
            raise Fault(f"{path} has no .jpg in it", "Fetch its frames.")
        return [Image(path / f"{at:05d}.jpg") for at in frame_numbers(*bounds, FOLDER_RATE, 1, count, FRAMES)]
    try:
        header = clips.header(path, count=path.suffix != ".mp4")  # an MP4's header names each frame, others guess
    except ClipError as error:
        raise Fault(f"{path} cannot be read: {error}", "Fetch it again.") from None
    numbers = frame_numbers(*bounds, header.frames / header.seconds, 0, header.frames - 1, FRAMES)
    return [Frame(path, at, header.size) for at in numbers]


def _unpacked(videos: Path) -> Iterator[Path]:
    """What the archives beside the clips hold; one of them has late clips in a folder of its own."""
    for archive in sorted(videos.glob("*.zip")):
        folder = unpack(archive)
        yield from (folder, folder / "data0613")


def _fetched(source: str, revision: str) -> Path:
    patterns = ["json/*.json", "video/*.zip"]
    try:
        return Path(snapshot_download(source, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        remedy = f"Accept its terms at https://huggingface.co/datasets/{source}, and log in: hf auth login."
        raise DataError(f"{source}: is given only to those who accept its terms\n  {remedy}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        found = " ".join(str(error).split())[:200]
        raise DataError(
            f"{source}: no folder here, and not to be had from the hub: {found}\n  Check its name."
        ) from None


MVBENCH = Benchmark(
    name="mvbench",
    source="OpenGVLab/MVBench",
    read=read,
    parse=parse,
    right=right,
    max_new_tokens=32,
    differences=(
        "a letter is read from what the answer says, small letters too",
        "the clips of Fine-grained Pose are not on the hub's main branch any more: the task is left out without them",
    ),
)
