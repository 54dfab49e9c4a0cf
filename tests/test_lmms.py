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


PROBE = """
import io, json, logging, sys
import PIL.Image
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from mantis_lite.tiny.tasks import drawn

METADATA = {"task": "t", "doc_id": 0, "repeats": 1}
heard = []
logging.getLogger("mantis_lite").addHandler(logging.Handler())
logging.getLogger("mantis_lite").handlers[-1].emit = lambda record: heard.append(record.getMessage())
exercise, files = drawn(1)
pictures = [PIL.Image.open(io.BytesIO(file)) for file in files]
open("p.png", "wb").write(files[0])
classes = [get_model("mantis_lite", force_simple=force) for force in (True, False)]
simple, chat = (made.create_from_arg_string("pretrained=tiny") for made in classes)
simple.task_dict = chat.task_dict = {"t": {"s": [{}]}}

def asked(model, kind, *args, times=4):
    try:
        found = getattr(model, kind)([Instance(kind, args, 0, METADATA) for _ in range(times)])
        return [getattr(each, "text", each) for each in found]
    except ValueError as error:
        return f"{type(error).__name__}: {error}"

def written(settings, media=pictures, text=exercise.question, times=4):
    settings = {"max_new_tokens": 8} | settings
    return asked(simple, "generate_until", text, settings, lambda doc: media, 0, "t", "s", times=times)

def said(*content):
    messages = lambda doc: [{"role": "user", "content": [*content, {"type": "text", "text": exercise.question}]}]
    return asked(chat, "generate_until", "", messages, {"max_new_tokens": 8}, 0, "t", "s")

def weighed(*args):
    return asked(simple, "loglikelihood", *args)

def begun(words):
    try:
        get_model("mantis_lite").create_from_arg_string(f"pretrained=tiny,{words}")
    except ValueError as error:
        return str(error)

image = {"type": "image", "url": pictures[0]}
print(json.dumps({
    "plain": written({}),
    "nothing drawn": written({"temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False}),
    "drawn": written({"do_sample": True, "temperature": 2.0}, times=32),
    "drawn without a temperature": written({"do_sample": True}),
    "beams": [written({"num_beams": 1}), written({"num_beams": 5})],
    "heard": list(heard),
    "until": written({"until": ["e"]}),
    "path": written({}, ["p.png"]),
    "same": written({}, pictures[:1]),
    "too many marks": written({}, pictures[:1], "<image> and <image>?"),
    "no clip": written({}, [{"type": "video", "url": "a.mp4", "video_start": 1, "video_end": 2}]),
    "unknown": written({}, [3]),
    "message": said(image), "message by path": said({"type": "image", "url": "p.png"}),
    "clip": said({"type": "video", "url": {"type": "video", "url": "a.mp4", "video_end": 2}}),
    "audio": said({"type": "audio", "url": "a.wav"}),
    "empty": weighed(exercise.question, "", lambda doc: pictures, 0, "t", "s"),
    "alone": weighed("", "red"),
    "rounds": asked(simple, "generate_until_multi_round"),
    "auto": begun("batch_size=auto"), "none": begun("batch_size=0"), "device": begun("device=cuda:3"),
}))
"""


def test_what_tasks_may_ask_for(tmp_path):
    environ = os.environ | {"PYTHONPATH": str(LMMS), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", PROBE], env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["nothing drawn"] == found["plain"] == found["plain"][:1] * 4
    assert len(set(found["drawn"])) > 1 and isinstance(found["drawn without a temperature"], list)
    (notice,) = found["heard"]
    assert notice == "lmms-eval: num_beams=5 is left out; answers are the likeliest, or drawn"
    assert found["until"][0] == found["plain"][0].partition("e")[0].strip()
    assert found["path"] == found["same"] and found["message"] == found["message by path"] == found["same"]
    told = {
        "too many marks": "SampleError: t:0: ",
        "no clip": "SampleError: t:0: no such file: a.mp4",
        "clip": "SampleError: t:0: no such file: a.mp4",
        "unknown": "RecipeError: lmms-eval: a task gives int\n  Leave it out",
        "audio": "RecipeError: lmms-eval: a task gives audio\n  Leave it out",
        "empty": "SampleError: t:0: a continuation is empty\n  Leave the task out.",
        "alone": "RecipeError: lmms-eval: acc_mutual_info weighs choices without their question",
        "rounds": "RecipeError: lmms-eval: tasks of several rounds are not asked",
        "auto": "--batch_size: expected a number, found auto",
        "none": "--batch_size: expected a number, found 0",
        "device": "--device: cuda:3, and the model is on cpu",
    }
    for name, words in told.items():
        assert found[name].startswith(words), (name, found[name])


def test_arguments_that_are_none(task, tmp_path):
    folder, _ = task
    ran = asked(folder, tmp_path, "--tasks", "made_written", "--model_args", "pretrained=tiny,use_flash=True")
    assert "--model_args: use_flash: no such argument" in ran.stdout + ran.stderr
