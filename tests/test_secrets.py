"""Tokens come from the environment alone: refused elsewhere without being repeated, and found in nothing produced."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import FakeHub
from helpers import chat, recipe, write_rows

from mantis_lite.data.mixture import sources_of
from mantis_lite.errors import RecipeError
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe import ModelRecipe, SourceRecipe
from mantis_lite.recipe_file import load_recipe, make_recipe
from mantis_lite.secrets import NAME
from mantis_lite.tiny import CHECKPOINT

HF, WANDB = "hf_" + "CanaryOfTheHub" * 2, "fedcba9876543210fedcba9876543210fedcba98"

SECRETS = [
    HF,
    f"https://huggingface.co/user/name?token={HF}",
    "hf_oauth_eyJhbGciOiJFZERTQSJ9",
    "api_org_" + "Aa" * 17,
    "sk-" + "a1B2" * 12,
    "sk-proj-a1_B2-c3_D4-e5_F6-g7",
    "ghp_" + "a1B2" * 9,
    "wandb_v1_" + "a1B2" * 20,
    WANDB,
    f"local-{WANDB}",
    "https://user:hunter2@example.com/rows.json",
    "s3://hunter2@example.com/rows",
    "https://example.com/rows.json?X-Amz-Signature=abc",
    "https://example.com/rows.json?id=1&sig=abc",
]
"""Each looks like a secret by itself, or has one in it."""

PLAIN = [
    "ann/pics:one:train",
    "runs/hf_adapter_of_the_second_of_september",
    "sk-learn-like-classifier-of-pictures",
    "https://example.com/rows.json?page=2",
    f"cache/snapshots/{WANDB}",
    "hf://datasets/ann/pics@main/rows.json",
    "Write to me@example.com, or see https://example.com.",
    "task-sk-risk",
]

PLACES = {
    "data": lambda secret: {"data": secret},
    "a list of data": lambda secret: {"data": [{"path": "rows.json"}, {"path": secret}]},
    "data.eval": lambda secret: {"data": {"sources": "rows.json", "eval": secret}},
    "model": lambda secret: {"model": {"name": "a/b", "adapter": secret}},
    "prompt": lambda secret: {"prompt": {"system": f"The word is {secret}"}},
    "a shorthand": lambda secret: {"packing": secret},
    "deep": lambda secret: {"train": {"optim_args": {"of": [{"it": secret}]}}},
    "an unknown key": lambda secret: {"nothing": {"like": secret}},
    "a key": lambda secret: {"train": {secret: 1}},
    "run_dir": lambda secret: {"run_dir": f"runs/{secret}"},
}


def refused(call, *words) -> str:
    with pytest.raises(RecipeError) as caught:
        call(*words)
    message = str(caught.value)
    assert "a token or password does not belong here" in message and "hf auth login" in message
    assert not any(secret in message for secret in [*SECRETS, "hunter2", WANDB])
    return message


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret(secret):
    refused(recipe, secret)
    refused(load_recipe, "chat", [f"data={secret}"])
    refused(load_recipe, "chat", ["data=rows.json", f"model={{name: a/b, adapter: '{secret}'}}"])


@pytest.mark.parametrize("text", PLAIN)
def test_what_does_not(text):
    assert make_recipe({"model": "a/b", "data": text, "run_dir": "r"}, [f"prompt.system={text}"]).prompt.system == text


def test_a_revision_is_a_commit():
    assert recipe({"name": "a/b", "revision": WANDB}).model.revision == WANDB
    assert load_recipe("chat", ["data=rows.json", f"model.revision={WANDB}"]).model.revision == WANDB
    refused(recipe, {"name": "a/b", "revision": HF})


@pytest.mark.parametrize("place", PLACES)
def test_wherever_it_hides(place, tmp_path):
    settings = {"model": "a/b", "data": "rows.json", "run_dir": "runs/x"} | PLACES[place](HF)
    refused(make_recipe, settings)
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(f"{key}: {value!r}" for key, value in settings.items()))
    refused(load_recipe, file)
    written = [f"{key}={value!r}" for key, value in PLACES[place](HF).items()]
    refused(load_recipe, "chat", ["data=rows.json", *written])


@pytest.mark.parametrize(
    "key", ["train.hub_token", "token", "model.token", "train.x.api-key", "wandb_api_key", "auth.Password"]
)
def test_a_key_by_its_name_whatever_it_holds(key):
    assert f": {key}: a token" in refused(load_recipe, "chat", ["data=rows.json", f"{key}=hunter2"])
    nested = "hunter2"
    for name in reversed(key.split(".")):
        nested = {name: nested}
    assert f": {key}: a token" in refused(make_recipe, {"data": "rows.json"} | nested)


def test_no_key_of_a_recipe_is_taken_for_one():
    from mantis_lite.recipe_file import _known_keys
    from mantis_lite.train_keys import train_keys

    assert [key for key in [*_known_keys(), *train_keys()] if NAME.search(key)] == ["hub_token"]


def test_a_token_in_yaml_that_cannot_be_read(tmp_path):
    file = tmp_path / "mine.yaml"
    for text in (f"model: [\n# {HF}\n", f"model: a/b\nmodel: {HF}\n", f"data: rows.json # {HF}"):
        file.write_text(text)
        refused(load_recipe, file)


def test_a_password_in_yaml_that_cannot_be_read_is_not_repeated(tmp_path):
    file = tmp_path / "mine.yaml"
    for text in ("hub_token: hunter2\nhub_token: hunter3\n", "train: {hub_token: hunter2, [", "hub_token: 'hunter2"):
        file.write_text(text)
        with pytest.raises(RecipeError, match="not YAML: line ") as caught:
            load_recipe(file)
        assert "hunter" not in str(caught.value)


def test_a_token_in_a_data_config(tmp_path):
    file = tmp_path / "config.yaml"
    for entry in (f"{{path: {SECRETS[-1]}, format: chat}}", "{path: rows.json, format: chat, token: hunter2}"):
        file.write_text(f"data: [{entry}]")
        refused(sources_of, SourceRecipe(path=str(file)), "chat")


@pytest.mark.parametrize(
    "words",
    [
        ["train", HF],
        ["train", "chat", "data=rows.json", HF],
        ["train", "chat", "--gpu", HF],
        ["train", "chat", f"--token={HF}"],
        ["predict", f"https://user:{HF}@example.com", "data=rows.json"],
        ["recipes", "show", HF],
        ["train", "chat", "data=rows.json", "hub_token=hunter2"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_the_command_line(words):
    done = subprocess.run([sys.executable, "-m", "mantis_lite", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("RecipeError: ") and "a token or password does not belong here" in done.stderr
    assert HF not in done.stderr and "hunter2" not in done.stderr


# Everything from here on is commands as a user types them, in processes of their own, with the loudest logging.

ROOT = Path(__file__).parents[1]
USER = "quetzalcoatl"
TOKENS = {"HF_TOKEN": HF, "HUGGING_FACE_HUB_TOKEN": "hf_" + "SecondCanary" * 3, "WANDB_API_KEY": WANDB}
CLI = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mantis_lite.cli import main; main()"
LOUD = "import logging; logging.basicConfig(level=logging.DEBUG)"


def texts_of(data: bytes) -> list[bytes]:
    """What bytes hold: themselves, and where they are a zip, as torch and numpy write, each member unpacked."""
    file = io.BytesIO(data)
    if not zipfile.is_zipfile(file):
        return [data]
    with zipfile.ZipFile(file) as archive:
        return [data, *(archive.read(name) for name in archive.namelist())]


def found_in(data: bytes, *more: str) -> list[str]:
    """Which tokens, and what `more`, bytes hold, in whatever letters: numpy writes each in four bytes."""
    texts = texts_of(data)
    return [
        needle
        for needle in (*TOKENS.values(), *more)
        if any(needle.encode(code) in text for code in ("utf-8", "utf-16-le", "utf-32-le") for text in texts)
    ]


def found_under(folder: Path) -> dict[str, list[str]]:
    """By file, what should not be in it: tokens, the user's name and so every path of theirs, and paths of the code."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    found = {str(path.relative_to(folder)): found_in(path.read_bytes(), USER, str(ROOT)) for path in files}
    return {name: needles for name, needles in found.items() if needles}


def test_what_is_hidden_is_found(tmp_path):
    np.savez_compressed(tmp_path / "rows.npz", where=[f"/home/{USER}/rows.jsonl"])
    torch.save({"token": HF}, tmp_path / "training_args.bin")
    (tmp_path / "readme.md").write_text(str(ROOT / "mantis_lite"))
    assert found_under(tmp_path) == {"readme.md": [str(ROOT)], "rows.npz": [USER], "training_args.bin": [HF]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's home, named as the user is: data, a base model, and what makes every process there loud."""
    home = tmp_path_factory.mktemp("homes") / USER
    shutil.copytree(CHECKPOINT, home / "work/base")
    write_rows(home / "work/rows.jsonl", [chat("<image>what?", f"number {i}", images=(i,)) for i in range(6)])
    (home / "loud").mkdir()
    (home / "loud/sitecustomize.py").write_text(LOUD)
    return home


@pytest.fixture(scope="module")
def environment(home):
    """All that a process of the user's is given."""
    kept = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS") if key in os.environ}
    user = dict.fromkeys(("USER", "LOGNAME", "USERNAME"), USER) | {"HOME": str(home)}
    loud = {f"{name}_VERBOSITY": "debug" for name in ("TRANSFORMERS", "HF_HUB", "DATASETS")}
    loud |= {"HF_DEBUG": "1", "ACCELERATE_LOG_LEVEL": "debug", "PYTHONPATH": str(home / "loud")}
    return kept | user | loud | TOKENS | {"HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="module")
def chain(home, environment):
    """What each command printed, and the hub, once all have run; paths are whole ones, which give the user away."""
    work = home / "work"
    own = [f"data={work / 'rows.jsonl'}", f"model={work / 'base'}", "run_dir=run", "packing.max_length=600"]
    own += ["train.max_steps=3", "train.save_strategy=steps", "train.save_steps=1", "train.samples_per_step=1"]
    printed = []
    with FakeHub(home.parent / "hub") as hub:
        for words in (
            [CLI, "recipes", "copy", "quickstart", "mine.yaml"],
            [CLI, "check", "mine.yaml", *own],
            [CLI, "fit", "mine.yaml", *own],
            [CLI, "train", "mine.yaml", *own],
            [CLI, "merge", "run", "--to", "merged"],
            [CLI, "push", "run", "ann/adapter"],
            [CLI, "push", "merged", "ann/merged", "--license=mit"],
            [CLI, "chat", "merged", "--prompt", "what?", "--max-new-tokens=4"],
        ):
            where = {"cwd": work, "env": environment | {"HF_ENDPOINT": hub.url}}
            done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True, **where)
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout + done.stderr)
        return printed, hub


@pytest.mark.slow
def test_no_token_is_printed_and_no_path_but_by_loggers(chain):
    """Other packages' debug lines name their folders on this machine; the commands' own name what was typed."""
    printed, _ = chain
    assert len(printed) == 8 and sum(text.count("DEBUG:") for text in printed) > 100
    assert [found_in(text.encode()) for text in printed] == [[]] * 8
    own = [line for text in printed for line in text.splitlines() if not line.startswith("DEBUG:")]
    assert own and not [line for line in own if USER in line]


@pytest.mark.slow
def test_what_is_pushed_names_neither_token_nor_user_nor_path(chain, home):
    _, hub = chain
    assert hub.tokens == {HF}  # it was there to be leaked
    assert hub.private == {"ann/adapter": True, "ann/merged": True}
    models = home.parent / "hub/models/ann"
    assert (models / "adapter/adapter_model.safetensors").is_file() and (models / "merged/model.safetensors").is_file()
    assert (
        found_under(home.parent / "hub")
        == found_under(home / "work/run/adapter")
        == found_under(home / "work/merged")
        == {}
    )
    assert [found_in(request, USER, str(ROOT)) for request in hub.received] == [[]] * len(hub.received)
    assert json.loads((models / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base"


@pytest.mark.slow
def test_a_run_keeps_paths_where_the_recipe_has_them_and_no_pickled_arguments(chain, home):
    """recipe.yaml and what else a run goes on from stay on this machine, and say where its data is, as the user did."""
    assert found_under(home / "work/run") == {"recipe.yaml": [USER]}
    assert not list((home / "work").rglob("training_args.bin"))


def test_a_base_is_named_as_others_know_it(tmp_path, monkeypatch):
    shutil.copytree(CHECKPOINT, tmp_path / "my-base")
    monkeypatch.chdir(tmp_path / "my-base")
    for name in (str(tmp_path / "my-base"), f"{tmp_path}/my-base/", "../my-base", "."):
        assert open_checkpoint(ModelRecipe(name=name)).public_name == "my-base"
    tiny = open_checkpoint(ModelRecipe(name="tiny"))
    assert tiny.public_name == "tiny"
    assert dataclasses.replace(tiny, name="ann/base", folder=tmp_path).public_name == "ann/base"


# Nothing is reported home.

GUARD = """
import os, socket
def refuse(*words, **_):
    address = words[1] if isinstance(words[0], socket.socket) else words[:2]
    if isinstance(address, tuple):  # not a socket of this machine's own, which has a path
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{address}\\n")
        raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.gethostbyname = refuse
"""
TRAIN = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import mantis_lite
{{before}}
mantis_lite.train("quickstart", sys.argv[1:])
"""
REPORTS = """
from mantis_lite.training.trainers import ChatTrainer
del ChatTrainer._send_telemetry
"""


def attempts(folder: Path, code: str, *words: str) -> list[str]:
    """The addresses a process tried to reach, with nothing in its environment that would keep it from it."""
    (folder / "guard").mkdir()
    (folder / "guard/sitecustomize.py").write_text(GUARD)
    tried = folder / "attempts.txt"
    tried.touch()
    rows = write_rows(folder / "rows.jsonl", [chat("<image>what?", f"number {i}", images=(i,)) for i in range(6)])
    own = [f"data={rows}", f"run_dir={folder / 'run'}", "packing.max_length=600", "train.samples_per_step=1"]
    own += ["train.max_steps=2", "train.save_strategy=steps", "train.save_steps=1"]
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HOME": str(folder), "ATTEMPTS": str(tried)}
    where = {"cwd": folder, "env": environment | {"PYTHONPATH": str(folder / "guard")}}
    done = subprocess.run([sys.executable, "-c", code, *words, *own], capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr
    assert (folder / "run/adapter/adapter_model.safetensors").is_file() and (folder / "run/checkpoint-2").is_dir()
    return tried.read_text().splitlines()


def test_training_reaches_for_nothing(tmp_path):
    assert attempts(tmp_path, TRAIN.format(before="")) == []


@pytest.mark.slow
def test_the_command_reaches_for_nothing(tmp_path):
    assert attempts(tmp_path, CLI, "train", "quickstart") == []


@pytest.mark.slow
def test_what_is_off_would_be_seen(tmp_path):
    assert attempts(tmp_path, TRAIN.format(before=REPORTS))
