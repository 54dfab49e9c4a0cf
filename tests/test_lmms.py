"""lmms-eval, as it is installed, asks our models its tasks: what it counts is what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mantis_lite.chat import MantisChat
from mantis_lite.tiny.tasks import drawn

LMMS = Path(sys.prefix) / "lmms"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LMMS.is_dir(), reason="lmms-eval is not here: make .venv/lmms"),
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_messages: !function utils.messages
doc_to_target: {target}
doc_to_choice: ["red", "4", "none"]
metadata: {{version: 0.0}}
"""
WRITTEN = """
generation_kwargs: {max_new_tokens: 16, until: [","]}
process_results: !function utils.results
metric_list: [{metric: said, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
UTILS = """
import json
from PIL import Image

def visual(doc):
    return [Image.open(file) for file in doc["files"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def messages(doc, lmms_eval_specific_kwargs=None):
    pictures = [{"type": "image", "url": picture} for picture in visual(doc)]
    words = [{"type": "text", "text": text} for text in ("See: ", doc["question"])]
    return [{"role": "user", "content": [words[0], *pictures, words[1]]}]

def results(doc, results):
    return {"said": float(results[0] == doc["said"][0]) + 2 * float(results[0] == doc["said"][1])}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Two tasks over eight drawn rows, each with what Tiny Mantis says itself: pictures in front, and behind a word."""
    folder = tmp_path_factory.mktemp("task")
    chat, rows = MantisChat("tiny"), []
    for at in range(8):
        exercise, pictures = drawn(at)
        files = [folder / f"{at}-{number}.png" for number in range(len(pictures))]
        for file, content in zip(files, pictures, strict=True):
            file.write_bytes(content)
        asked = (exercise.question, "See: " + "<image>" * len(files) + exercise.question)
        said = [chat.generate([{"text": text, "images": files}], max_new_tokens=16)[0] for text in asked]
        row = {"question": exercise.question, "files": list(map(str, files)), "gold": at % 3}
        rows.append(row | {"said": [text.partition(",")[0].strip() for text in said]})
    data = folder / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, kind, target, more in (
        ("made_written", "generate_until", "gold", WRITTEN),
        ("made_chosen", "multiple_choice", "gold", CHOSEN),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, target=target) + more)
    (folder / "utils.py").write_text(UTILS)
    return folder, rows


def asked(folder: Path, out: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lmms_eval", "--model", "mantis_lite", "--include_path", str(folder), *words]
    environ = os.environ | {"PYTHONPATH": str(LMMS), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    command += ["--batch_size", "3", "--log_samples", "--output_path", str(out)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, cwd=folder)


def scores(out: Path, ran: subprocess.CompletedProcess) -> dict[str, dict]:
    found = list(out.rglob("*_results.json"))
    assert len(found) == 1, ran.stdout + ran.stderr
    return json.loads(found[0].read_text())["results"]


def test_messages_keep_their_pictures_where_they_are(task, tmp_path):
    folder, rows = task
    ran = asked(folder, tmp_path, "--tasks", "made_written", "--model_args", "pretrained=tiny")
    same = sum(row["said"][0] == row["said"][1] for row in rows)
    assert scores(tmp_path, ran)["made_written"]["said,none"] == (2 * len(rows) + same) / len(rows)


def test_texts_have_theirs_in_front_and_choices_are_weighed(task, tmp_path):
    folder, rows = task
    words = ["--tasks", "made_written,made_chosen", "--force_simple", "--model_args", "pretrained=tiny"]
    found = scores(tmp_path, asked(folder, tmp_path, *words))
    same = sum(row["said"][0] == row["said"][1] for row in rows)
    assert found["made_written"]["said,none"] == (len(rows) + 2 * same) / len(rows)
    right = sum(chosen(row) == row["gold"] for row in rows)
    assert found["made_chosen"]["acc,none"] == right / len(rows)


def chosen(row: dict) -> int:
    """The likeliest of the three, each in a forward of its own."""
    from mantis_lite.agreement import logits_of
    from mantis_lite.data.sample import Image, Sample, Turn

    chat = MantisChat("tiny")
    turn = Turn("user", (*(Image(Path(file)) for file in row["files"]), row["question"]))
    scores = []
    for choice in ("red", "4", "none"):
        sample = Sample("row", None, (turn, Turn("assistant", (choice,))))
        logits = logits_of(chat.model, chat.encoder, [sample]).log_softmax(-1)
        encoded = chat.encoder.encode(sample)
        ids = encoded.input_ids[encoded.labels >= 0]
        scores.append(sum(float(row[token]) for row, token in zip(logits[:-1], ids[:-1], strict=True)))
    return max(range(3), key=scores.__getitem__)


def test_arguments_that_are_none(task, tmp_path):
    folder, _ = task
    ran = asked(folder, tmp_path, "--tasks", "made_written", "--model_args", "pretrained=tiny,use_flash=True")
    assert "--model_args: use_flash: no such argument" in ran.stdout + ran.stderr
