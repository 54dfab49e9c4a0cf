"""Small copies of the six benchmarks in the layouts they are published in, with pictures and clips drawn here."""

import io
import json
import random
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from clips_made import make

from mantis_lite.tiny.pictures import THINGS, draw


def png(seed: int) -> bytes:
    file = io.BytesIO()
    draw(THINGS[seed % len(THINGS)], random.Random(seed)).save(file, "PNG")
    return file.getvalue()


def image(seed: int) -> dict:
    """As the hub's Parquet has a picture."""
    return {"bytes": png(seed), "path": f"{seed}.png"}


def parquet(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def mantis_eval(folder: Path) -> Path:
    """As on the hub: options with their letters, and a question in words."""
    rows = [
        {
            "id": f"mantis_eval_{at}",
            "question_type": "multi-choice" if at % 3 else "short-answer",
            "question": "<image> <image> Which is red?" if at % 2 else "Which is red?",
            "images": [image(at), image(at + 1)],
            "options": ["(A) Image 1", "(B) Image 2"] if at % 3 else [],
            "answer": ("(A)", "B")[at % 2] if at % 3 else "Two",
            "data_source": "made",
            "category": ("difference description", "counting")[at % 2],
        }
        for at in range(6)
    ]
    return parquet(folder / "mantis_eval/test-00000-of-00001.parquet", rows)


def nlvr2(folder: Path) -> Path:
    """Mantis' list as JSON, its pictures beside it; True is not always A."""
    rows = []
    for at in range(8):
        files = [f"pictures/{at}-{side}.png" for side in (0, 1)]
        for number, file in enumerate(files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(png(at + number))
        rows.append(
            {
                "id": f"test1-{at // 4}-{at % 2}-{at // 2 % 2}",
                "question_type": "multi-choice",
                "question": f"<image><image> Here is a statement. Is it true or false?\nStatement {at}.",
                "images": files,
                "options": ["(A) True", "(B) False"] if at % 3 else ["(A) False", "(B) True"],
                "answer": "AB"[at % 2],
                "data_source": "nlvr2_test",
                "category": "logical reasoning",
            }
        )
    (folder / "test.json").write_text(json.dumps(rows))
    return folder / "test.json"


def qbench2(folder: Path) -> Path:
    """The hub's columns, an option unused in every second row."""
    rows = [
        {
            "id": at,
            "image1": image(at),
            "image2": image(at + 1),
            "question": "Which picture is sharper?",
            "option0": "The first",
            "option1": "The second",
            "option2": "About the same",
            "option3": "Neither" if at % 2 else "N/A",
            "question_type": at % 3,
            "question_concern": at % 4,
            "correct_choice": "ABC"[at % 3],
        }
        for at in range(6)
    ]
    return parquet(folder / "data/dev-00000-of-00001.parquet", rows).parent


def qbench2_lines(folder: Path) -> Path:
    """The same rows as lines, which name a pair of pictures joined, and a folder of the pictures."""
    (folder / "all_single_images").mkdir(parents=True)
    for at in range(7):
        (folder / f"all_single_images/{at:05d}.jpg").write_bytes(png(at))
    options = ["The first", "The second", "About the same", "Neither"]
    rows = [
        {
            "type": at % 3,
            "concern": at % 4,
            "question": "Which picture is sharper?",
            "img_path": f"llvisionqa_compare_dev\\{at:05d}.jpg_cat_{at + 1:05d}.jpg.jpg",
            "candidates": options[: 3 + at % 2],
            "correct_ans": options[at % 3],
            "correct_choice": "ABC"[at % 3],
        }
        for at in range(6)
    ]
    file = folder / "q-bench2-a1-dev.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def blink(folder: Path, answer: str = "(B)") -> Path:
    """Two of its tasks, each a folder of its own, with one to four pictures."""
    for task, pictures in (("Counting", 1), ("Art_Style", 3)):
        rows = [
            {
                "idx": f"val_{task}_{at + 1}",
                "sub_task": task,
                "question": "How many?",
                "prompt": "How many are there? Select from the following choices.\n(A) 1\n(B) 2\n(C) 3",
                "choices": ["1", "2", "3"],
                "answer": answer if at else "(A)",
                **{f"image_{n}": image(at + n) if n <= pictures else None for n in range(1, 5)},
            }
            for at in range(2 if task == "Counting" else 4)
        ]
        parquet(folder / task / "val-00000-of-00001.parquet", rows)
    return folder


MVBENCH = {
    "action_antonym": ("ssv2_video", "clip {}.mp4", {}),
    "action_localization": ("sta/sta_video", "{}.mp4", {"start": 0.2, "end": 0.8}),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "show {}", {"start": 1.0, "end": 4.0}),
    "object_existence": ("clevrer/video_validation", "a/{}.mp4", {}),
    "fine_grained_pose": ("nturgbd", "{}.avi", {}),
}
"""Five of its tasks: clips, clips in an archive and with bounds, folders of frames; the last has no clips here."""


def mvbench(folder: Path) -> Path:
    for task, (place, name, bounds) in MVBENCH.items():
        rows = []
        for at in range(3):
            row = {"video": name.format(at), "question": f"What happens in {at}?", "candidates": ["up", "down", "not"]}
            rows.append(row | {"answer": row["candidates"][at]} | bounds)
            if task != "fine_grained_pose":
                _clip(folder / "video" / place / name.format(at), at)
        (folder / "json").mkdir(exist_ok=True)
        (folder / "json" / f"{task}.json").write_text(json.dumps(rows))
    with ZipFile(folder / "video/sta.zip", "w") as archive:
        for file in sorted((folder / "video/sta").rglob("*.mp4")):
            archive.write(file, file.relative_to(folder / "video"))
            file.unlink()
    (folder / "video/sta/sta_video").rmdir()
    return folder


def _clip(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        make(path, frames=30 + 10 * number)
        return
    path.mkdir()
    for at in range(1, 16):
        PIL.Image.fromarray(np.full((20, 30, 3), at, dtype=np.uint8)).save(path / f"{at:05d}.jpg")


def mementos(folder: Path) -> Path:
    """Two subsets, with other columns and one byte that is no UTF-8."""
    for name, key, told in (("dl", "image_name", "description"), ("robo", "image", "description")):
        lines = [f"{key},{told}"]
        for at in range(3):
            lines.append(f'{at}.png,"A dog runs to ball {at}, and jumps."')
            for number in range(1, 16 if at else 4):
                file = folder / f"images/single_image_{name}/{at}/{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(png(number))
        content = "\n".join(lines).encode().replace(b"ball 2", b"caf\xe9 ball" if name == "dl" else b"ball 2")
        (folder / f"{name}_description.csv").write_bytes(content + b"\n")
    return folder
