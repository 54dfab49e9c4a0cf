"""The contract beside what was trained is what it is used by: told in full, and held to."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import chat, train, write_rows
from safetensors.torch import load_file, save_file

from mantis_lite.agreement import logits_of
from mantis_lite.chat import MantisChat
from mantis_lite.contract import NAME, read_contract
from mantis_lite.data.template import LLAMA_3
from mantis_lite.errors import RecipeError
from mantis_lite.merge import _drawn
from mantis_lite.plain_clients import write_template
from mantis_lite.recipe_file import make_recipe
from mantis_lite.trained import open_trained
from mantis_lite.training.start import start


@pytest.fixture(scope="module")
def run_of(folder_of, tmp_path_factory):
    @cache
    def get(family="llava", system=None, **settings):
        settings |= {"prompt": {"system": system}} if system else {}
        folder = tmp_path_factory.mktemp(f"{family}-run")
        rows = [chat(f"what is <image>, number {i}?", f"number {i}", images=(i,)) for i in range(6)]
        own = {"max_steps": 2, "learning_rate": 0.05, "samples_per_step": 4, "save_strategy": "steps", "save_steps": 1}
        base = {"data": write_rows(folder / "rows.jsonl", rows), "run_dir": str(folder / "run"), "train": own}
        base |= {"model": str(folder_of(family)), "packing": {"max_length": 512}, "memory": {"kernels": "off"}}
        train(make_recipe(base | {"method": "lora"} | settings))
        return folder / "run"

    return get


def made_by(source, *overrides) -> torch.Tensor:
    """Logits of what is opened, on drawn rows."""
    trained = open_trained(source, overrides)
    return logits_of(trained.load(), trained.encoder, [_drawn(at, True) for at in range(2)])


def alone(run: Path, folder: Path) -> Path:
    """A run's adapter without the run, as one that was pulled from somewhere."""
    return Path(shutil.copytree(run / "adapter", folder / "pulled"))


def rewritten(adapter: Path, change) -> Path:
    contract = json.loads((adapter / NAME).read_text())
    change(contract)
    (adapter / NAME).write_text(json.dumps(contract))
    return adapter


def test_the_contract_says_all(run_of, folder_of):
    run = run_of()
    found = read_contract(run / "adapter")
    assert (found.kind, found.task, found.method, found.quantized) == ("adapter", "chat", "lora", [])
    assert found.base.name == folder_of("llava").name and len(found.base.weights) == 32
    assert (found.facts.family, found.facts.template, found.facts.backend) == ("llava", LLAMA_3.name, "pil")
    assert found.facts.processor["image_mean"] == [0.5] * 3 and found.facts.processor["size"]
    assert (found.data.rows, found.data.held_out) == (6, 0) and len(found.data.fingerprint) == 32
    assert found.recipe["data"]["sources"][0]["path"] == "rows.jsonl" and found.recipe["packing"]["max_length"] == 512
    assert {"torch", "transformers", "peft"} <= found.versions.keys() and found.metrics["loss"] > 0
    assert str(run.parent) not in (run / "adapter" / NAME).read_text()
    assert "pirate" in (run / "adapter/chat_template.jinja").read_text()
    card = (run / "adapter/README.md").read_text()
    assert "library_name: peft\n" in card and "mantis-lite chat user/run" in card and "base_model:" not in card


def test_an_adapter_alone_is_used_as_in_its_run(run_of, folder_of, tmp_path):
    run = run_of()
    adapter, base = alone(run, tmp_path), folder_of("llava")
    expected = made_by(run)
    assert torch.equal(made_by(run / "adapter"), expected) and torch.equal(made_by(run / "checkpoint-2"), expected)
    assert not torch.equal(made_by(run / "checkpoint-1"), expected)
    assert torch.equal(made_by(adapter, f"model={base}"), expected)
    with pytest.raises(RecipeError, match=rf"trained on a folder called {base.name}\n  Add model=FOLDER"):
        open_trained(adapter)
    (adapter / NAME).unlink()  # as of another tool
    assert torch.equal(made_by(adapter, f"model={base}"), expected)


def test_a_system_turn_that_was_trained_comes_with_it(run_of, folder_of, tmp_path):
    run = run_of(system="Be brief.")
    adapter = alone(run, tmp_path)
    assert MantisChat(adapter, overrides=[f"model={folder_of('llava')}"]).encoder.system == "Be brief."
    assert "Be brief." in (adapter / "chat_template.jinja").read_text()


def test_a_template_of_the_base_s_own_gives_way(encoder, tmp_path):
    for name, key in (("chat_template.json", "chat_template"), ("tokenizer_config.json", "chat_template")):
        (tmp_path / name).write_text(json.dumps({key: "another", "bos_token": "<s>"}))
    write_template(tmp_path, encoder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat_template.jinja", "tokenizer_config.json"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"bos_token": "<s>"}
    assert "another" not in (tmp_path / "chat_template.jinja").read_text()


def test_words_with_slashes_are_no_paths(run_of):
    words = "/no_think Answer yes/no. " + "x/" * 130
    assert read_contract(run_of(system=words) / "adapter").recipe["prompt"]["system"] == words


def test_a_full_run_is_its_model(run_of):
    run = run_of("idefics2", method="full")
    assert read_contract(run / "model").kind == "model"
    assert torch.equal(made_by(run), made_by(run / "model"))
    with pytest.raises(RecipeError, match="a checkpoint of a full fine-tune\n  Train it to its end"):
        open_trained(run / "checkpoint-1")


def test_a_run_that_is_not_finished(run_of, folder_of, tmp_path):
    run = run_of()
    recipe = open_trained(run).recipe
    unfinished = start(recipe.model_copy(update={"run_dir": tmp_path / "run"}))
    unfinished.lock.release()
    with pytest.raises(RecipeError, match="the run is not finished\n  Train it to its end, `mantis-lite train`, or"):
        open_trained(tmp_path / "run")


CHANGED = {
    "template": lambda c: c["facts"].update(template="idefics_2"),
    "template_hash": lambda c: c["facts"].update(template_hash="0" * 32),
    "vocabulary": lambda c: c["facts"].update(vocabulary="0" * 32),
    "processor.image_mean": lambda c: c["facts"]["processor"].update(image_mean=[0.4] * 3),
    "pictures": lambda c: c["facts"].update(pictures="llava 576 577 None"),
    "backend": lambda c: c["facts"].update(backend="torchvision"),
    "frames.fps": lambda c: c["facts"]["frames"].update(fps=2.0),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_is_not_as_it_was_trained(run_of, folder_of, tmp_path, what):
    adapter = rewritten(alone(run_of(), tmp_path), CHANGED[what])
    with pytest.raises(RecipeError, match=rf"was trained with {what} .*, and here it is .*\n  Use it as it was"):
        open_trained(adapter, [f"model={folder_of('llava')}"])


SAID_TWICE = {
    "task": lambda c: c.update(task="video"),
    "quantized": lambda c: c.update(quantized=["language_model"]),
    "kind": lambda c: c.update(kind="model"),
}


@pytest.mark.parametrize("what", SAID_TWICE)
def test_a_contract_that_contradicts_itself(run_of, folder_of, tmp_path, what):
    adapter = rewritten(alone(run_of(), tmp_path), SAID_TWICE[what])
    with pytest.raises(RecipeError, match=rf"says another {what} than its recipe or what lies beside it\n  Take the"):
        open_trained(adapter, [f"model={folder_of('llava')}"])


def test_settings_that_are_no_use_to_what_is_trained(run_of, folder_of, tmp_path):
    run = run_of("idefics2", method="full")
    for word in ("model=x", "model.name=x", "model.revision=x"):
        with pytest.raises(RecipeError, match=r"no effect on .*, a model with no adapter beside it\n  Leave it out"):
            open_trained(run, [word])
    for word in ("lora.r=3", "train.learning_rate=1", "method=full", "task=chat"):
        with pytest.raises(RecipeError, match=r": has no effect on what is trained already\n  Set only model, data"):
            open_trained(run_of(), [word])


def test_settings_that_change_what_pictures_come_to(run_of):
    run = run_of("idefics2")
    with pytest.raises(RecipeError, match=r"was trained with pictures idefics2 .* False .*, and here it is .* True"):
        open_trained(run, ["media.image_splitting=true"])
    with pytest.raises(RecipeError, match=r"was trained with template idefics_2, and here it is idefics_2_hub"):
        MantisChat(run, template="hub")


def test_another_base_or_revision(run_of, folder_of, tmp_path):
    base = Path(shutil.copytree(folder_of("llava"), tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights[max(weights)] += 0.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = rewritten(alone(run_of(), tmp_path), lambda c: c["base"].update(revision="abc"))
    with pytest.raises(RecipeError, match=r"trained on llava0? at revision abc, and the weights of base are others"):
        open_trained(adapter, [f"model={base}"]).load()
    assert open_trained(adapter, [f"model={base}", "model.any_base=true"]).load()
    with pytest.raises(RecipeError, match=r"the weights of base are others\n  Set model \(and model.revision\) to"):
        MantisChat(adapter, overrides=[f"model={base}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot be read: Expecting property name"),
        ("[]", r"cannot be read: it is a list, and no object"),
        ('{"format": 2}', r"cannot be read: format: input should be 1\n  Take it as it was written, or a newer"),
        (None, r"cannot be read: no such file"),
    ],
)
def test_a_contract_that_cannot_be_read(run_of, tmp_path, content, message):
    adapter = alone(run_of(), tmp_path)
    (adapter / NAME).unlink()
    if content is None:
        (adapter / NAME).symlink_to(tmp_path / "gone")
    else:
        (adapter / NAME).write_text(content)
    with pytest.raises(RecipeError, match=message):
        open_trained(adapter)


def test_a_recipe_that_cannot_be_used(run_of, tmp_path):
    adapter = rewritten(alone(run_of(), tmp_path), lambda c: c["recipe"].update(newer=1))
    with pytest.raises(RecipeError, match=r"mantis_lite.json: its recipe cannot be used: newer: no such key"):
        open_trained(adapter)
    rewritten(adapter, lambda c: c.update(run="x" + "0" * 16))
    with pytest.raises(RecipeError, match=r"mantis_lite.json: cannot be read: run: string should match pattern"):
        open_trained(adapter)


def test_what_scores_does_not_chat(folder_of, run_of, tmp_path):
    rows = [{"prompt": f"how good is {i}?", "label": float(i)} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    own = {"max_steps": 1, "learning_rate": 0.01, "samples_per_step": 4, "save_strategy": "no"}
    settings = {"model": str(folder_of("llava")), "data": str(tmp_path / "rows.json"), "run_dir": str(tmp_path / "run")}
    settings |= {"task": "classify", "method": "lora", "head": {"problem": "regression"}, "train": own}
    train(make_recipe(settings | {"memory": {"kernels": "off"}}))
    found = read_contract(tmp_path / "run/adapter")
    assert found.labels.problem == "regression" and len(found.labels.names) == 1 and not found.labels.tokens
    assert not (tmp_path / "run/adapter/chat_template.jinja").exists()
    with pytest.raises(RecipeError, match=r"scores, and does not answer\n  mantis-lite predict .* data=new.json"):
        MantisChat(tmp_path / "run")
