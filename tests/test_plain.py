"""Trained, merged, and used where this package is not: transformers alone says the same, token for token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from families import FAMILIES
from helpers import chat, in_numbers, picture, train, write_rows
from safetensors.torch import save_file

from mantis_lite.chat import MantisChat
from mantis_lite.data.collate import collate
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.generate import _padded, generate
from mantis_lite.merge import merge
from mantis_lite.models.load import placed
from mantis_lite.recipe_file import make_recipe
from mantis_lite.scoring import predict
from mantis_lite.trained import open_trained

TOKENS = 8
METHODS = {
    "lora": {"method": "lora"},
    "dora": {"method": "lora", "lora": {"dora": True}},
    "qlora": {"method": "qlora"},
    "full": {"method": "full"},
}
ALONE = """
import sys
sys.modules |= dict.fromkeys(("mantis_lite", "peft", "trl", "bitsandbytes"))  # as if they were not installed
import json, traceback
from pathlib import Path
import PIL.Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

def asked(folder, pictures):
    one, two = ({"type": "image", "image": PIL.Image.open(path)} for path in pictures)
    turns = [
        {"role": "user", "content": [one, {"type": "text", "text": " What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "And "}, two, {"type": "text", "text": " ?"}]},
    ]
    processor = AutoProcessor.from_pretrained(folder)
    return processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )

def says(folder, inputs, count):
    inputs = asked(folder, inputs) if isinstance(inputs, list) else load_file(inputs)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    found = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return found[0, inputs["input_ids"].shape[1] :].tolist()

def scores(folder, inputs):
    head = load_file(Path(folder) / "model.safetensors")
    hidden = AutoModel.from_pretrained(folder)(**load_file(inputs)).last_hidden_state[0, -1]
    return (hidden @ head["score.weight"].T + head["score.bias"]).tolist()

for line in sys.stdin:
    name, *words = json.loads(line)
    try:
        found = {"says": says, "scores": scores}[name](*words)
    except Exception as error:
        found = traceback.format_exc()
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def alone():
    """Asks a process in which there is transformers and nothing of what trains."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", ALONE], text=True, cwd="/", **pipes) as process:

        def ask(*words) -> list:
            process.stdin.write(json.dumps(words, default=str) + "\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            assert isinstance(found, list), found
            return found

        yield ask
        process.stdin.close()


def trained(base: Path, folder: Path, **settings) -> Path:
    rows = [chat(f"what is <image> next to {i}?", f"number {i} is red", images=(i,)) for i in range(4)]
    own = {"max_steps": 2, "learning_rate": 0.05, "samples_per_step": 4, "save_strategy": "no"}
    found = {"model": str(base), "data": write_rows(folder / "rows.jsonl", rows), "run_dir": str(folder / "run")}
    train(make_recipe(found | {"train": own, "packing": {"max_length": 512}, "memory": {"kernels": "off"}} | settings))
    return folder / "run"


def asked(pictures: list[Path]) -> Sample:
    one, two = map(Image, pictures)
    turns = (Turn("user", (one, " What is it?")), Turn("assistant", ("A dog",)), Turn("user", ("And ", two, " ?")))
    return Sample("asked", None, turns)


def says_the_same(alone, run: Path, folder: Path, scratch: Path) -> None:
    """What a run says of two pictures, in two turns, transformers alone says of the folder."""
    pictures = [scratch / f"{seed}.png" for seed in (1, 2)]
    for seed, path in enumerate(pictures, 1):
        path.write_bytes(picture(seed))
    ours = MantisChat(run)
    encoded = ours.encoder.encode_prompt(asked(pictures))
    (expected,) = generate(ours.model, ours.encoder, [encoded], TOKENS)
    end = ours.encoder.token_id(ours.encoder.template.end)
    expected = [*expected, end][:TOKENS]
    if ours.trained.checkpoint.config.model_type in ("llava", "idefics2", "idefics3"):
        found = alone("says", folder, pictures, TOKENS)
    else:  # their processors ask for packages that are not here; what these make of pictures, test_jinja.py compares
        plain = in_numbers(encoded, ours.trained.checkpoint.image_processor)
        save_file(dict(_padded(ours.encoder, [plain])), scratch / "inputs.safetensors")
        found = alone("says", folder, scratch / "inputs.safetensors", TOKENS)
    assert found == expected


def test_transformers_alone_says_the_same(alone, folder_of, tmp_path):
    run = trained(folder_of("llava"), tmp_path, method="lora")
    merge(run, tmp_path / "merged")
    says_the_same(alone, run, tmp_path / "merged", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_family_and_method(alone, folder_of, family, tmp_path, method):
    run = trained(folder_of(family), tmp_path, **METHODS[method])
    folder = run / "model"
    if method != "full":
        folder = merge(run, tmp_path / "merged").folder
    says_the_same(alone, run, folder, tmp_path)


@pytest.mark.slow
def test_a_head_is_a_layer_on_the_backbone(alone, folder_of, family, tmp_path):
    rows = [{"images": [f"{i}.png"], "prompt": "<image> how good?", "label": float(i)} for i in range(4)]
    for at in range(4):
        (tmp_path / f"{at}.png").write_bytes(picture(at))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = {"task": "classify", "method": "lora", "head": {"problem": "regression"}}
    run = trained(folder_of(family), tmp_path, **settings, data=str(tmp_path / "rows.json"))
    merge(run, tmp_path / "merged")
    opened = open_trained(run)
    encoded = opened.encoder.encode(Sample("s", None, (Turn("user", (Image(tmp_path / "1.png"), " how good?")),)))
    plain = in_numbers(encoded, opened.checkpoint.image_processor)
    inputs = dict(_padded(opened.encoder, [plain]))
    if family == "idefics2":  # the stock layout, of one picture
        inputs["pixel_values"] = torch.from_numpy(plain.pixels[0]["view 0"])[None, None]
    model = opened.load()
    batch = collate([encoded], opened.encoder.vision.batch)
    del batch["labels"]
    with torch.no_grad():
        expected = model(**placed(batch, model)).logits[0].tolist()
    save_file(inputs, tmp_path / "inputs.safetensors")
    assert alone("scores", tmp_path / "merged", tmp_path / "inputs.safetensors") == pytest.approx(expected, abs=1e-4)


PUSHES = """
import json, sys
from mantis_lite.push import push
for name, run in json.loads(sys.argv[1]).items():
    push(run, name)
"""
ASKS = """
import json, sys
from mantis_lite.chat import MantisChat
from mantis_lite.scoring import predict
found = {}
for name, (base, data) in json.loads(sys.argv[1]).items():
    if data:
        found[name] = predict(name, [f"data={data}", f"model={base}"]).logits.tolist()
    else:
        found[name] = MantisChat(name, overrides=[f"model={base}"])("What is it?", images=["1.png"], max_new_tokens=8)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_pushed_says_the_same_where_it_is_pulled(folder_of, tmp_path):
    """Every family: LoRA, DoRA, QLoRA and a score head, pulled by a process that has the base and nothing else."""
    (tmp_path / "1.png").write_bytes(picture(1))
    rows = [{"images": ["1.png"], "prompt": f"<image> how good is {i}?", "label": float(i)} for i in range(4)]
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    head = {"task": "classify", "method": "lora", "head": {"problem": "regression"}}
    kinds = {"lora": METHODS["lora"], "dora": METHODS["dora"], "qlora": METHODS["qlora"]}
    runs, asked, expected = {}, {}, {}
    for family in FAMILIES:
        for kind in (*kinds, "head"):
            name, folder = f"ann/{family}-{kind}", tmp_path / f"{family}-{kind}"
            folder.mkdir()
            data = str(tmp_path / "scores.json") if kind == "head" else None
            runs[name] = trained(folder_of(family), folder, **(head | {"data": data} if data else kinds[kind]))
            asked[name] = (folder_of(family), data)
            if data:
                expected[name] = predict(runs[name], [f"data={data}"]).logits.tolist()
            else:
                expected[name] = MantisChat(runs[name])("What is it?", images=[tmp_path / "1.png"], max_new_tokens=8)
    with FakeHub(tmp_path / "hub") as hub:
        for code, words in ((PUSHES, runs), (ASKS, asked)):
            home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / ("there" if code is ASKS else "here"))}
            home["HF_ENDPOINT"] = hub.url
            own = os.environ | home | {"HF_TOKEN": "hf_" + "a" * 30, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
            command = [sys.executable, "-c", code, json.dumps(words, default=str)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=own)
            assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == expected and len(found) == 4 * len(FAMILIES)
