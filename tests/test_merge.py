"""A merged model is its adapter on its base, in the base's layout; and what cannot be merged leaves nothing behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from helpers import chat, picture, train, write_rows
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import mantis_lite.merge
from mantis_lite.agreement import logits_of
from mantis_lite.chat import MantisChat
from mantis_lite.contract import read_contract
from mantis_lite.errors import CheckError, DiskError, RecipeError
from mantis_lite.merge import merge
from mantis_lite.models.load import load_model
from mantis_lite.models.merging import Laid, stand_in
from mantis_lite.recipe_file import make_recipe
from mantis_lite.scoring import predict
from mantis_lite.trained import open_trained

KINDS = {
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "dora": {"method": "lora", "lora": {"dora": True}},
    "qdora": {"method": "qlora", "lora": {"dora": True}},
    "rslora": {"method": "lora", "lora": {"rslora": True}},
    "pissa": {"method": "lora", "lora": {"init": "pissa"}},
    "olora": {"method": "lora", "lora": {"init": "olora"}},
    "projector": {"method": "lora", "trainable": {"projector": "full", "vision_tower": "adapter"}},
    "all in 4 bits": {"method": "qlora", "memory": {"quantize": ["language_model", "projector", "vision_tower"]}},
}


@pytest.fixture(scope="module")
def run_of(folder_of, tmp_path_factory):
    """A trained run by family and kind, in two steps whose rate moves what is said."""

    @cache
    def get(family, kind="lora", held_out=True, **_):
        folder = tmp_path_factory.mktemp(f"{family}-run")
        rows = [chat(f"what is <image> next to number {i}?", f"number {i} is red", images=(i, i + 1)) for i in range(6)]
        settings = {
            "model": str(folder_of(family)),
            "data": {"sources": write_rows(folder / "rows.jsonl", rows), "eval": 0.3 if held_out else None},
            "run_dir": str(folder / "run"),
            "packing": {"max_length": 512},
            "train": {"max_steps": 2, "learning_rate": 0.05, "samples_per_step": 4, "save_strategy": "no"},
        }
        own = {"memory": {"kernels": "off"} | KINDS[kind].get("memory", {})}
        train(make_recipe(settings | KINDS[kind] | own))
        return folder / "run"

    return get


def logits(model, trained) -> torch.Tensor:
    """What a model makes of the drawn rows, by the trained one's encoder."""
    return logits_of(model, trained.encoder, [mantis_lite.merge._drawn(at, True) for at in range(4)])


def test_a_merged_model_is_its_adapter_on_its_base(run_of, family, tmp_path):
    run = run_of(family)
    found = merge(run, tmp_path / "merged")
    assert found.base == "full" and found.agreement.share == 1 and found.agreement.kl < 1e-6
    assert found.agreement.largest < 1e-3 and found.agreement.rows == "2 held-out rows"
    trained = open_trained(run)
    expected = logits(trained.load(), trained)
    ours = open_trained(tmp_path / "merged")
    torch.testing.assert_close(logits(ours.load(), ours), expected, atol=1e-4, rtol=1e-4)
    assert (logits(load_model(trained.checkpoint, trained.recipe), trained) - expected).abs().max() > 0.1
    published = load_file(trained.checkpoint.folder / "model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == published.keys()
    assert {k: (v.dtype, v.shape) for k, v in merged.items()} == {k: (v.dtype, v.shape) for k, v in published.items()}
    assert any(not torch.equal(merged[key], published[key]) for key in merged)
    config = (tmp_path / "merged/config.json").read_text()
    assert config == (trained.checkpoint.folder / "config.json").read_text()
    contract = read_contract(tmp_path / "merged")
    assert (contract.kind, contract.merged, contract.run) == ("merged", "full", trained.contract.run)
    assert contract.agreement["share"] == 1 and contract.agreement["rows"] == "2 held-out rows"
    assert "| of them, the same choice | 1 |" in (tmp_path / "merged/README.md").read_text()


QUICK = ("qlora", "dora", "projector")


def some_slow(names, quick):
    """All of them, most in the slow suite."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("kind", some_slow([kind for kind in KINDS if kind != "lora"], QUICK))
def test_every_kind_of_adapter(run_of, tmp_path, kind):
    run = run_of("llava", kind)
    found = merge(run, tmp_path / "merged")
    assert found.base == ("dequantized" if KINDS[kind]["method"] == "qlora" else "full")
    assert found.agreement.share == 1 and found.agreement.largest < 1e-3
    trained, plain = open_trained(run), AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    trained.checkpoint.family.adapt(plain, trained.checkpoint.image_processor)  # which reads our encoder's bytes
    torch.testing.assert_close(logits(plain, trained), logits(trained.load(), trained), atol=1e-3, rtol=1e-3)


def test_what_was_in_4_bits_is_what_training_had(run_of, folder_of):
    """Every weight: those of the layers that were in 4 bits as bitsandbytes unpacks them, all others to the bit."""
    trained = open_trained(run_of("llava", "all in 4 bits"))
    loaded = load_model(trained.checkpoint, trained.recipe)
    laid = Laid(
        stand_in(trained.checkpoint.config, False),
        trained.checkpoint.family,
        [(str(trained.adapter), 1.0)],
        "linear",
        trained.recipe.quantized,
    )
    packed = 0
    for key, own in load_file(trained.checkpoint.folder / "model.safetensors").items():
        name = laid.rename(key)
        weight = loaded.get_parameter(name)
        expected = own
        if hasattr(weight, "quant_state"):
            packed += 1
            expected = dequantize_4bit(weight.data, weight.quant_state)
            assert not torch.equal(expected, own)
        owner = name.rpartition(".")[0]
        value = laid._unpacked(own) if name.endswith(".weight") and laid._in_4_bits(owner) else own
        assert torch.equal(value, expected), name
    assert packed > 20


def test_a_4_bit_adapter_on_the_full_base_says_otherwise(run_of, tmp_path):
    run = run_of("llava", "qlora")
    exact, other = merge(run, tmp_path / "a").agreement, merge(run, tmp_path / "b", base="full", least=0.0).agreement
    assert exact.largest < 1e-3 < other.largest and exact.kl < other.kl
    with pytest.raises(CheckError, match=r"trained on weights in 4 bits: --base dequantized") as caught:
        merge(run, tmp_path / "c", base="full", least=1.1)
    assert caught.value.exit_code == 8 and "110.00% are asked for" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_chat_says_the_same_before_and_after(run_of, tmp_path):
    run = run_of("llava")
    merge(run, tmp_path / "merged")
    asked = [{"text": f"what is number {at}?"} for at in range(3)]
    before, after = MantisChat(run), MantisChat(tmp_path / "merged")
    assert before.generate(asked, max_new_tokens=12) == after.generate(asked, max_new_tokens=12)
    assert before.generate(asked, max_new_tokens=12) != MantisChat(open_trained(run).checkpoint.folder).generate(
        asked, max_new_tokens=12
    )
    settings = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert before.encoder.token_id("<|eot_id|>") in settings["eos_token_id"]


def split(folder: Path, target: Path) -> Path:
    """A checkpoint as larger ones are published, its weights in three files."""
    base = Path(shutil.copytree(folder, target))
    whole = load_file(base / "model.safetensors")
    places = {}
    for at in range(3):
        name = f"model-{at + 1:05}-of-00003.safetensors"
        keys = sorted(whole)[at::3]
        save_file({key: whole[key] for key in keys}, base / name, metadata={"format": "pt"})
        places |= dict.fromkeys(keys, name)
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return base


def test_several_files_of_weights_and_their_index(run_of, folder_of, tmp_path):
    base = split(folder_of("llava"), tmp_path / "base")
    places = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    one, three = tmp_path / "one", tmp_path / "three"
    merge(run_of("llava"), one)
    merge(run_of("llava"), three, overrides=[f"model={base}"])  # the same weights, by another name
    index = json.loads((three / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict(sorted(places.items()))
    found = {key: tensor for name in set(places.values()) for key, tensor in load_file(three / name).items()}
    expected = load_file(one / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert AutoModelForImageTextToText.from_pretrained(three)


# What comes from elsewhere: adapters that PEFT alone has made.


def foreign(folder, target, rows=0, **settings) -> Path:
    """An adapter on a base as other tools make them; `rows` is how many words the base was given for it."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    if rows:
        model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)
    adapted.save_pretrained(target)
    return target


WORDS = {"target_modules": r".*language_model.*q_proj|.*text_model.*q_proj"}


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_words_that_are_one_matrix_come_apart(folder_of, tmp_path, saved):
    adapter = foreign(folder_of("smolvlm"), tmp_path / "adapter", modules_to_save=saved, **WORDS)
    assert json.loads((folder_of("smolvlm") / "config.json").read_text())["tie_word_embeddings"] is True
    found = merge(adapter, tmp_path / "merged", overrides=[f"model={folder_of('smolvlm')}"])
    assert found.agreement.share == 1 and found.agreement.largest < 1e-3 and found.agreement.rows == "32 drawn rows"
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False


def test_words_that_an_adapter_brings(folder_of, tmp_path):
    base = folder_of("llava")
    before = json.loads((base / "config.json").read_text())["text_config"]["vocab_size"]
    adapter = foreign(base, tmp_path / "adapter", before + 2, modules_to_save=["embed_tokens", "lm_head"], **WORDS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    found = merge(adapter, tmp_path / "merged", overrides=[f"model={base}"])
    assert found.agreement.share == 1 and found.agreement.largest < 1e-3
    assert json.loads((tmp_path / "merged/config.json").read_text())["text_config"]["vocab_size"] == before + 2
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert plain.get_input_embeddings().weight.shape[0] == before + 2


def test_several_adapters_by_weight(folder_of, tmp_path):
    base = folder_of("llava")
    one = foreign(base, tmp_path / "one", **WORDS)
    two = foreign(base, tmp_path / "two", **(WORDS | {"target_modules": r".*language_model.*q_proj", "lora_alpha": 16}))
    found = merge(one, tmp_path / "merged", None, [f"model={base}"], [(str(two), 0.25)], 0.5)
    assert found.agreement.share == 1 and found.agreement.largest < 1e-3
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig.from_pretrained(one))
    for name, folder in (("default", one), ("two", two)):
        model.load_adapter(folder, name)
    model.add_weighted_adapter(["default", "two"], [0.5, 0.25], "both", "linear")
    model.set_adapter("both")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    expected = model.merge_and_unload().state_dict()
    assert all(torch.allclose(plain[key], expected[key], atol=1e-6) for key in expected)
    contract = read_contract(tmp_path / "merged")
    assert [part.weight for part in contract.combined] == [0.5, 0.25] and contract.combine == "linear"
    assert contract.made != read_contract(merge(one, tmp_path / "alone", None, [f"model={base}"]).folder).made
    with pytest.raises(RecipeError, match=r"cannot be combined by nonsense: .*\n  Try another --combine"):
        merge(one, tmp_path / "no", None, [f"model={base}"], [(str(two), 0.25)], 0.5, "nonsense")


def test_what_is_no_sum_of_adapters(run_of, tmp_path):
    with pytest.raises(RecipeError, match=r"is of DoRA, which is no sum of adapters\n  Merge it alone"):
        merge(run_of("llava", "dora"), tmp_path / "merged", weight=0.5)
    with pytest.raises(RecipeError, match=r"is of lora.init=pissa, which is no sum"):
        merge(run_of("llava", "pissa"), tmp_path / "merged", weight=0.5)


WAYS = ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("combine", some_slow(WAYS, ("linear", "dare_linear")))
def test_every_way_of_combining(folder_of, tmp_path, combine):
    base = folder_of("llava")
    one, two = foreign(base, tmp_path / "one", **WORDS), foreign(base, tmp_path / "two", **WORDS)
    found = merge(one, tmp_path / "merged", None, [f"model={base}"], [(str(two), 0.25)], 0.5, combine)
    assert found.agreement.share == 1 and found.agreement.largest < 1e-3


def test_others_are_of_the_same_base_and_trained_alike(run_of, folder_of, scored, tmp_path):
    run = run_of("llava")
    other = copied(run_of("llava", "qlora"), tmp_path)
    with pytest.raises(RecipeError, match=r"--with: .* on another quantized: \['language_model'\], and"):
        merge(run, tmp_path / "merged", others=[(str(other), 0.5)])
    shutil.rmtree(other)
    other = copied(run, tmp_path)
    contract = json.loads((other / "adapter/mantis_lite.json").read_text())
    contract["base"]["weights"] = "0" * 32
    (other / "adapter/mantis_lite.json").write_text(json.dumps(contract))
    with pytest.raises(RecipeError, match=r"copy: was trained on .*, and the weights of .* are others"):
        merge(run, tmp_path / "merged", others=[(str(other), 0.5)])
    with pytest.raises(RecipeError, match=r"another task: classify, and .* on chat\n  Combine what is alike"):
        merge(run, tmp_path / "merged", others=[(str(scored("llava", "regression")[0]), 0.5)])
    with pytest.raises(RecipeError, match=r"has no effect on .*, a model with no adapter beside it"):
        merge(run, tmp_path / "merged", others=[(str(merge(run, tmp_path / "whole").folder), 0.5)])
    with pytest.raises(RecipeError, match=r"the weight of .* is nan\n  Give a number"):
        merge(run, tmp_path / "merged", weight=float("nan"))
    with pytest.raises(RecipeError, match=r"has trained more than LoRA \(modules_to_save\), which is no sum"):
        merge(run_of("llava", "projector"), tmp_path / "merged", weight=0.5)
    with pytest.raises(RecipeError, match=r"has trained more than LoRA \(modules_to_save\)"):
        merge(scored("llava", "regression")[0], tmp_path / "merged", weight=0.5)


# What is refused, with nothing left behind.


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy"))


def spoilt(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def matches_nothing(run, base):
    settings = json.loads((run / "adapter/adapter_config.json").read_text())
    settings["target_modules"] = "nowhere"
    (run / "adapter/adapter_config.json").write_text(json.dumps(settings))


def poisoned(run, base):
    spoilt(run / "adapter/adapter_model.safetensors", lambda t: next(iter(t.values())).fill_(float("nan")))


def too_large(run, base):
    spoilt(run / "adapter/adapter_model.safetensors", lambda t: [v.fill_(1e18) for v in t.values()])


def half_missing(run, base):
    spoilt(run / "adapter/adapter_model.safetensors", lambda t: [t.pop(k) for k in sorted(t)[:2]])


def another_base(run, base):
    spoilt(base / "model.safetensors", lambda t: [v.add_(0.01) for v in t.values()])


def in_4_bits(run, base):
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config))


REFUSED = {
    "matches nothing": (matches_nothing, r"does not fit this llava"),
    "poisoned": (poisoned, r"tensors of .* are not finite"),
    "too large": (too_large, r"the adapter says what is no number|is not finite in the torch.float32 of the base"),
    "half is missing": (half_missing, r"are missing for this llava"),
    "another base": (another_base, r"was trained on .*, and the weights of base are others\n  Set model"),
    "a 4-bit target": (
        in_4_bits,
        r"is saved in few bits, into which nothing can be merged\n  Set model to the original",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged(run_of, folder_of, tmp_path, case):
    run = copied(run_of("llava"), tmp_path)
    base = Path(shutil.copytree(folder_of("llava"), tmp_path / "base"))
    change, message = REFUSED[case]
    change(run, base)
    with pytest.raises(CheckError if case == "too large" else RecipeError, match=message):
        merge(run, tmp_path / "merged", overrides=[f"model={base}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "copy"]


def test_the_same_base_saved_another_way_may_be_named(run_of, folder_of, tmp_path):
    base = Path(shutil.copytree(folder_of("llava"), tmp_path / "base"))
    spoilt(base / "model.safetensors", lambda t: t.update({k: v.half() for k, v in t.items()}))
    with pytest.raises(RecipeError, match=r"model.any_base=true"):
        merge(run_of("llava"), tmp_path / "merged", overrides=[f"model={base}"])
    for text in ("true", "True"):
        own = [f"model={base}", f"model.any_base={text}"]
        assert merge(run_of("llava"), tmp_path / text, overrides=own, least=0.5).agreement
    with pytest.raises(RecipeError, match=r"model.any_base: expected true or false, found 'maybe'"):
        merge(run_of("llava"), tmp_path / "merged", overrides=[f"model={base}", "model.any_base=maybe"])


def test_what_is_no_adapter_and_what_is_there(run_of, folder_of, tmp_path):
    with pytest.raises(RecipeError, match=r"is a model, with no adapter beside it"):
        merge(folder_of("llava"), tmp_path / "merged")
    with pytest.raises(RecipeError, match=r"--to: .* exists already\n  Name another folder"):
        merge(run_of("llava"), tmp_path)
    with pytest.raises(RecipeError, match=r"--base: dequantized, but the adapter was trained on no weight in 4 bits"):
        merge(run_of("llava"), tmp_path / "merged", base="dequantized")


def test_rows_that_are_not_there_any_more(run_of, tmp_path):
    run = copied(run_of("llava"), tmp_path)
    recipe = (run / "recipe.yaml").read_text().replace("rows.jsonl", "gone.jsonl")
    (run / "recipe.yaml").write_text(recipe)
    with pytest.raises(RecipeError, match=r"the rows to compare on cannot be read: .*\n  Add data=FILE"):
        merge(run, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert merge(run, tmp_path / "merged", least=None).agreement is None


def test_where_a_merged_model_goes(run_of, tmp_path):
    (tmp_path / "merged.tmp-notes").mkdir()
    (tmp_path / "merged.tmp-99999999").write_text("mine")
    assert merge(run_of("llava"), tmp_path / "merged", least=None).folder.is_dir()
    assert (tmp_path / "merged.tmp-notes").is_dir() and (tmp_path / "merged.tmp-99999999").is_file()
    with pytest.raises(RecipeError, match=r"--to: there is no folder .*none\n  Make it, or name another"):
        merge(run_of("llava"), tmp_path / "none/merged")


def test_settings_that_merging_does_not_go_by(run_of, tmp_path):
    with pytest.raises(RecipeError, match=r"lora.r: has no effect on what is trained already\n  Set only model, data"):
        merge(run_of("llava"), tmp_path / "merged", overrides=["lora.r=3"])
    with pytest.raises(RecipeError, match=r"method: has no effect on what is trained already"):
        merge(run_of("llava", "qlora"), tmp_path / "merged", overrides=["method=lora"])


def test_a_full_disk(run_of, tmp_path, monkeypatch):
    run = run_of("llava")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mantis_lite.merge.write_files", full)
    with pytest.raises(DiskError, match=r"could not be written: No space left"):
        merge(run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("mantis_lite.merge.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskError, match=r"the merged model takes about 0.00 GB, and 0.00 are free"):
        merge(run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


# Score heads.


@pytest.fixture(scope="module")
def scored(folder_of, tmp_path_factory):
    """A trained run with a head: its folder and its rows."""

    @cache
    def get(family, problem, score="last_token", method="lora"):
        folder = tmp_path_factory.mktemp(f"{family}-{problem}")
        right = {"regression": {"a": 1.5, "b": -2}, "single_label": "cat", "multi_label": ["a"]}
        other = {"regression": {"a": 0.5, "b": 3}, "single_label": "dog", "multi_label": ["a", "b"]}
        rows = [
            {
                "images": [{"bytes": picture(at)}],
                "prompt": f"<image> what {at}?",
                "labels": (right, other)[at % 2][problem],
            }
            for at in range(6)
        ]
        data = write_rows(folder / "rows.jsonl", rows)
        labels = {"regression": ["a", "b"], "multi_label": ["a", "b"], "single_label": ["cat", "dog"]}[problem]
        settings = {"model": str(folder_of(family)), "data": data, "run_dir": str(folder / "run"), "method": method}
        settings |= {"task": "classify", "head": {"problem": problem, "labels": labels, "score": score}}
        settings |= {"packing": {"max_length": 512}, "memory": {"kernels": "off"}}
        own = {"max_steps": 2, "learning_rate": 0.05, "samples_per_step": 4, "save_strategy": "no"}
        train(make_recipe(settings | {"train": own}))
        return folder / "run", data

    return get


@pytest.mark.parametrize(
    ("kind", "problem", "score", "method"),
    [
        ("idefics2", "regression", "last_token", "lora"),
        ("llava", "single_label", "last_token", "qlora"),
        ("qwen2_vl", "multi_label", "special_tokens", "lora"),
        pytest.param("smolvlm", "regression", "last_token", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_merged_head_scores_the_same(scored, tmp_path, kind, problem, score, method):
    run, data = scored(kind, problem, score, method)
    found = merge(run, tmp_path / "merged")
    assert found.agreement.share == 1 and found.agreement.rows == "6 rows of training"
    expected = predict(run, [f"data={data}"], output=tmp_path / "run.jsonl")
    ours = predict(tmp_path / "merged", [f"data={data}"], output=tmp_path / "merged.jsonl")
    assert ours.labels == expected.labels
    torch.testing.assert_close(torch.tensor(ours.logits), torch.tensor(expected.logits), atol=1e-3, rtol=1e-3)
    keys = load_file(tmp_path / "merged/model.safetensors")
    assert keys["score.weight"].dtype == torch.float32 and not [key for key in keys if "lm_head" in key]


KILLED = """
import os, signal, sys
import mantis_lite.merge as merging, mantis_lite.models.weights as writing
plain, count = writing.write_tensors, iter(range(2))
def kills(*words):
    found = plain(*words)
    if next(count) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
writing.write_tensors = kills
merging.merge(sys.argv[1], sys.argv[2], None, [f"model={sys.argv[3]}"])
"""


@pytest.mark.slow
def test_a_merge_that_is_killed_leaves_no_model(run_of, folder_of, tmp_path):
    base = split(folder_of("llava"), tmp_path / "base")
    words = [run_of("llava"), tmp_path / "merged", base]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = (path for path in tmp_path.iterdir() if path != base)
    assert left.name.startswith("merged.tmp-")
    merge(run_of("llava"), tmp_path / "merged", overrides=[f"model={base}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]
