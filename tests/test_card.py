"""The card of what was trained: what it states is so, what is not known is left out, and its code runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub
from helpers import chat, picture, train, write_rows
from huggingface_hub import ModelCard

from mantis_lite.card import License, card, is_on_hub, recipe_yaml, stated_license
from mantis_lite.chat import MantisChat
from mantis_lite.contract import read_contract
from mantis_lite.data.jinja import chat_template
from mantis_lite.recipe_file import load_recipe, make_recipe
from mantis_lite.trained import open_trained

LLAMA3 = License("other", "llama3", "https://example.com/license")
ASKED = " What is different in the second picture?"


def run_of(folder: Path, base: Path, **more) -> Path:
    """A short run on a tiny base, with what else the recipe says; returns the folder of what it trained."""
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,)) for i in range(6)]
    if more.get("task") == "classify":
        rows = [{"images": row["images"], "text": "which?", "label": "ab"[i % 2]} for i, row in enumerate(rows)]
    steps = {"max_steps": 3, "learning_rate": 3e-3, "samples_per_step": 6, "save_strategy": "no", "logging_steps": 1}
    data = write_rows(folder / "rows.jsonl", rows)
    settings = {"model": str(base), "data": data, "run_dir": str(folder / "run"), "method": "lora", "train": steps}
    return train(make_recipe(settings | more))


@pytest.fixture(scope="module")
def contract(tmp_path_factory, llava_folder):
    folder = tmp_path_factory.mktemp("carded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANTIS_LITE_CACHE", str(folder / "cache"))
        return read_contract(run_of(folder, llava_folder))


def changed(contract, **more):
    """A contract whose nested fields are others: base_name for base.name."""
    for key, value in more.items():
        part, _, field = key.partition("_")
        if field:
            value = getattr(contract, part).model_copy(update={field: value})
        contract = contract.model_copy(update={part: value})
    return contract


def recipe_with(contract, **more):
    return contract.model_copy(update={"recipe": contract.recipe | more})


def metadata(contract, *words, **more) -> dict:
    """The front matter, as the hub's own reader reads it."""
    return ModelCard(card(contract, "ann/adapter", *words, **more)).data.to_dict()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def test_what_is_known_of_it(contract):
    text = card(contract, "ann/adapter", curve=True)
    assert metadata(contract) == {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mantis", "multi-image", "mantis-lite", "lora", "llava", "chat"],
    }
    assert "# adapter\n" in text and "6 rows" in text and contract.data.fingerprint in text
    assert f"| loss | {contract.metrics['loss']:.4g} |" in text and "![The loss by step](loss.png)" in text
    assert "loss.png" not in card(contract, "ann/adapter")
    assert all(f"{name} {version}\n" in text for name, version in contract.versions.items())
    assert blocks(text, "yaml") == [recipe_yaml(contract)]
    assert blocks(text, "")[0] == "mantis-lite chat ann/adapter model=path/to/the/base\n"
    assert "Agreement" not in text and "None is stated here" in text


def test_the_recipe_is_one(contract, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(contract))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert json.loads(recipe.model_dump_json(exclude={"run_dir"})) == contract.recipe


def test_a_base_is_named_where_it_is_on_the_hub(contract, tmp_path, monkeypatch):
    named = changed(contract, base_name="ann/base", base_revision=COMMIT)
    found = metadata(named)
    assert (found["base_model"], found["base_model_relation"]) == ("ann/base", "adapter")
    text = card(named, "ann/adapter")
    assert f"[ann/base](https://huggingface.co/ann/base), at revision `{COMMIT}`" in text
    assert "mantis-lite chat ann/adapter\n" in text and f'"revision": "{COMMIT}"' in text
    for kind in ("model", "merged"):
        found = metadata(changed(named, kind=kind))
        assert (found["base_model_relation"], found["library_name"]) == ("finetune", "transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann/base").mkdir(parents=True)
    assert "base_model" not in metadata(named)
    assert "Mantis-Lite's own `tiny`" in card(changed(contract, base_name="tiny"), "ann/adapter")


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_on_hub("TIGER-Lab/Mantis-8B-siglip-llama3")
    others = ["base", "/home/ann", "../ann", "./ann", "a/b/c", "ann/a b", "C:\\ann", "~/ann", "", "ann/", "/ann"]
    assert [name for name in others if is_on_hub(name)] == []


def test_data_sets_of_the_hub(contract):
    paths = ["ann/pics:one:train", "ann/pics:two", "bob/clips", "rows.jsonl", "folder", "old/rows.json"]
    data = contract.recipe["data"] | {"sources": [{"path": path} for path in paths]}
    found = recipe_with(contract, data=data)
    assert metadata(found)["datasets"] == ["ann/pics", "bob/clips"]
    assert "of [ann/pics](https://huggingface.co/datasets/ann/pics), [bob/clips]" in card(found, "ann/adapter")
    assert "without a word of its data" in card(changed(contract, data=None), "ann/adapter")


def test_tags_by_method(contract):
    dora = recipe_with(contract, lora=contract.recipe["lora"] | {"dora": True})
    for found, tags in (
        (changed(contract, method="qlora"), ["lora", "qlora"]),
        (dora, ["lora", "dora"]),
        (changed(dora, method="full"), ["full-fine-tune"]),
    ):
        assert metadata(found)["tags"][3:-2] == tags


def test_what_the_hub_calls_it(contract):
    assert metadata(changed(contract, task="video"))["pipeline_tag"] == "video-text-to-text"
    scored = {"problem": "single_label", "names": ["a", "b"], "tokens": False}
    classes = changed(contract, task="classify").model_validate(
        contract.model_dump() | {"task": "classify", "labels": scored}
    )
    assert metadata(classes)["pipeline_tag"] == "image-classification"
    clips = recipe_with(classes, media=contract.recipe["media"] | {"num_frames": 8})
    assert metadata(clips)["pipeline_tag"] == "video-classification"
    assert "pipeline_tag" not in metadata(changed(classes, labels_problem="regression"))
    assert "a score for each of: a, b (single_label)" in card(classes, "ann/adapter")
    assert "mantis-lite predict ann/adapter data=new.json model=path/to/the/base" in card(classes, "ann/adapter")


def test_licenses(contract):
    assert metadata(contract, License("mit"))["license"] == "mit"
    found = metadata(contract, LLAMA3, LLAMA3)
    assert [found[key] for key in ("license", "license_name", "license_link")] == list(vars(LLAMA3).values())
    text = card(contract, "ann/adapter", License("mit"), LLAMA3)
    assert (
        "Given under mit. The base, `" in text and "is under [llama3](https://example.com/license): its terms" in text
    )
    assert "license" not in metadata(contract, None, None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n# Mine", License("mit")),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
            License("other", "llama3", "LICENSE"),
        ),
        ("---\nlicense: mit\n---", License("mit")),
        ("---\nlicense: [mit, other]\n---\n", None),
        ("---\nlicense: other\nlicense_name: [x]\n---\n", License("other")),
        ("---\nlicense: !!python/name:os.system x\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("# license: mit", None),
        ("", None),
    ],
)
def test_the_license_that_a_card_states(text, found):
    assert stated_license(text) == found


def test_a_merged_models_agreement(contract):
    figures = {"positions": 96, "share": 1.0, "kl": 1.5e-7, "rows": "32 held-out rows"}
    merged = changed(contract, kind="merged", merged="dequantized", agreement=figures)
    text = card(merged, "ann/merged")
    assert "once they have been in 4 bits" in text
    assert "| of them, the same choice | 1 |\n" in text and "| KL divergence, nats | 1.5e-07 |\n" in text
    assert "| in | 32 held-out rows |\n" in text
    text = card(changed(contract, kind="merged", merged="full"), "ann/merged")
    assert "the base's own weights" in text and "was not compared" in text


def test_metrics_that_are_not_defined(contract):
    assert "| eval_auc | not defined |" in card(changed(contract, metrics={"eval_auc": None}), "ann/adapter")
    assert "None were measured" in card(changed(contract, metrics={}), "ann/adapter")


def test_a_prompt_cannot_close_a_block(contract):
    found = recipe_with(contract, prompt=contract.recipe["prompt"] | {"system": "```\n# Not a heading\n```"})
    assert "\n````yaml\n" in card(found, "ann/adapter")


def test_code_by_family(contract):
    for family, template in (("idefics2", "idefics_2"), ("idefics3", "idefics_3"), ("qwen2_vl", "qwen2_vl")):
        media = contract.recipe["media"] | {"max_image_size": 560}
        found = recipe_with(changed(contract, facts_family=family, facts_template=template), media=media)
        (code,) = blocks(card(found, "ann/adapter"), "python")
        compile(code, "card", "exec")
        assert ("do_image_splitting = False" in code) == (family == "idefics2")
        assert ('size = {"longest_edge": 560}' in code) == (family == "idefics3")
        assert ("thumbnail((560, 560), " in code) == (family != "idefics3")
    fuyu = card(changed(contract, facts_family="fuyu", facts_template="mfuyu_v1"), "ann/adapter")
    assert "plain transformers cannot be used" in fuyu and not blocks(fuyu, "python")


# The code of a card, run as it stands, where the hub is all that there is.


def code_runs(code: str, hub, folder: Path) -> str:
    """What the code of a card prints."""
    for number, name in enumerate(("first.png", "second.png")):
        (folder / name).write_bytes(picture(number))
    rows = [{"images": row["images"], "text": "which?"} for row in (chat("x", images=(i,)) for i in range(3))]
    write_rows(folder / "new.json", rows)
    lines = (folder / "new.json").read_text().splitlines()
    (folder / "new.json").write_text(f"[{','.join(lines)}]")
    kept = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS") if key in os.environ}
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HOME": str(folder), "HF_HOME": str(folder / "hf")}
    environment = kept | own | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = {"capture_output": True, "text": True, "cwd": folder, "env": environment}
    done = subprocess.run([sys.executable, "-c", code], **words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def published(hub, name: str, folder: Path) -> Path:
    """A folder as it lies on the hub, with the chat template that a push adds; and its contract there."""
    trained, there = open_trained(folder), shutil.copytree(folder, hub.folder / "models" / name)
    contract = changed(trained.contract, base_name="ann/base")
    recipe_with(contract, model=contract.recipe["model"] | {"name": "ann/base"}).write(there)
    if trained.head is None:
        encoder = trained.encoder
        template = chat_template(encoder.template, encoder.vision, encoder.system)
        (there / "chat_template.jinja").write_text(template)
    return there


@pytest.fixture
def hub(tmp_path):
    with FakeHub(tmp_path / "hub") as hub:
        yield hub


CHATS = {
    "lora": ("llava", {}),
    "in full": ("llava", {"method": "full"}),
    "another system": ("llava", {"prompt": {"system": "Be brief: {{ 'x' }}"}}),
    "idefics2": ("idefics2", {"media": {"max_image_size": 60}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHATS)
def test_code_of_a_chat_gives_the_same_answer(hub, folder_of, tmp_path, name):
    family, more = CHATS[name]
    base = shutil.copytree(folder_of(family), hub.folder / "models/ann/base")
    if family == "idefics2":  # as it is published
        processor = {"processor_class": "Idefics2Processor", "image_seq_len": 4}
        (base / "processor_config.json").write_text(json.dumps(processor))
    folder = run_of(tmp_path, base, **more)
    there = published(hub, "ann/mine", folder)
    (code,) = blocks(card(read_contract(there), "ann/mine"), "python")
    printed = code_runs(code, hub, tmp_path)
    pictures = [tmp_path / "first.png", tmp_path / "second.png"]
    assert printed.rstrip("\n") == MantisChat(folder.parent)(ASKED, images=pictures, max_new_tokens=64)


@pytest.mark.slow
def test_code_of_a_score_head_gives_scores(hub, llava_folder, tmp_path):
    base = shutil.copytree(llava_folder, hub.folder / "models/ann/base")
    head = {"problem": "single_label", "labels": ["a", "b"]}
    there = published(hub, "ann/mine", run_of(tmp_path, base, task="classify", head=head))
    (code,) = blocks(card(read_contract(there), "ann/mine"), "python")
    printed = code_runs(code, hub, tmp_path)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(lines) == 3 and all(set(line["probabilities"]) == {"a", "b"} for line in lines), printed
