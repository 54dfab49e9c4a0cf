"""Tokens come from the environment alone: refused elsewhere without being repeated, and found in nothing produced."""

import subprocess
import sys

import pytest
from helpers import recipe

from mantis_lite.data.source import expand
from mantis_lite.errors import RecipeError
from mantis_lite.recipe import load_recipe, make_recipe
from mantis_lite.secrets import NAME

HF, WANDB = "hf_" + "CanaryOfTheHub" * 2, "0123456789abcdef0123456789abcdef01234567"

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
    from mantis_lite.recipe import _known_keys, _train_keys

    assert [key for key in [*_known_keys(), *_train_keys()] if NAME.search(key)] == ["hub_token"]


def test_a_token_in_yaml_that_cannot_be_read(tmp_path):
    file = tmp_path / "mine.yaml"
    for text in (f"model: [\n# {HF}\n", f"model: a/b\nmodel: {HF}\n", f"data: rows.json # {HF}"):
        file.write_text(text)
        refused(load_recipe, file)


def test_a_token_in_a_data_config(tmp_path):
    file = tmp_path / "config.yaml"
    for entry in (f"{{path: {SECRETS[-1]}, format: chat}}", "{path: rows.json, format: chat, token: hunter2}"):
        file.write_text(f"data: [{entry}]")
        refused(expand, str(file))


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
