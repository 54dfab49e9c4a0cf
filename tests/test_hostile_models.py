"""Checkpoints and adapters that name code, kernels or files elsewhere, or claim what they are not, are refused."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import recipe
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mantis_lite.errors import RecipeError
from mantis_lite.models.adapter_config import check_tensors, read_settings
from mantis_lite.models.adapters import find_adapter, load_adapter, make_trainable
from mantis_lite.models.checkpoint import open_checkpoint, read_config
from mantis_lite.models.load import load_model
from mantis_lite.models.small_files import read_small
from mantis_lite.recipe import ModelRecipe
from mantis_lite.recipe_file import make_recipe

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def copied(llava_folder, tmp_path):
    return shutil.copytree(llava_folder, tmp_path / "copied")


def changed(folder: Path, name: str, **keys) -> None:
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | keys))


def within(folder: Path, part: str, **keys) -> None:
    config = json.loads((folder / "config.json").read_text())
    changed(folder, "config.json", **{part: config[part] | keys})


def index(folder: Path, *names) -> None:
    changed(folder, "model.safetensors.index.json", weight_map={f"w{at}": name for at, name in enumerate(names)})


CODE = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
FOUND_CODE = "auto_map: the checkpoint brings code of its own, and none is ever run"
KERNEL, PLACES = "and no kernel is loaded that a checkpoint names", "and no file of weights"
CHECKPOINTS = {
    "code": (lambda f: changed(f, "config.json", auto_map=CODE), FOUND_CODE),
    "code elsewhere": (lambda f: changed(f, "config.json", auto_map={"AutoConfig": "a/b--evil.Config"}), FOUND_CODE),
    "code of a part": (lambda f: within(f, "text_config", auto_map=CODE), FOUND_CODE),
    "tokenizer's code": (
        lambda f: changed(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        FOUND_CODE,
    ),
    "processor's code": (lambda f: changed(f, "processor_config.json", auto_map={"AutoProcessor": "e.P"}), FOUND_CODE),
    "pictures' code": (
        lambda f: changed(f, "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.P"}),
        FOUND_CODE,
    ),
    "generation's code": (lambda f: changed(f, "generation_config.json", auto_map={"x": "evil.G"}), FOUND_CODE),
    "kernel": (lambda f: changed(f, "config.json", attn_implementation="evil/kernel"), KERNEL),
    "kernel within": (lambda f: changed(f, "config.json", _attn_implementation_internal="evil/kernel"), KERNEL),
    "kernel of a revision": (lambda f: changed(f, "config.json", _attn_implementation="a/b@main:fwd"), KERNEL),
    "kernel of a part": (lambda f: within(f, "text_config", attn_implementation="evil/kernel"), KERNEL),
    "kernel of the tower": (lambda f: within(f, "vision_config", _attn_implementation_internal="e/k"), KERNEL),
    "kernels by part": (lambda f: changed(f, "config.json", attn_implementation={"text_config": "evil/k"}), KERNEL),
    "paged kernel": (lambda f: changed(f, "config.json", attn_implementation="paged|evil/kernel"), KERNEL),
    "kernel of experts": (lambda f: changed(f, "config.json", experts_implementation="evil/kernel"), KERNEL),
    "kernel as a list": (lambda f: changed(f, "config.json", attn_implementation=["evil/kernel"]), KERNEL),
    "vocabulary": (lambda f: changed(f, "tokenizer_config.json", vocab_file="/etc/passwd"), "a file of this machine"),
    "vocabulary beside": (
        lambda f: changed(f, "tokenizer_config.json", vocab_file=os.path.relpath("/etc/passwd")),
        "a file of this machine",
    ),
    "merges": (lambda f: changed(f, "tokenizer_config.json", merges_file="/etc/hosts"), "a file of this machine"),
    "up": (lambda f: index(f, "../secret.safetensors"), PLACES),
    "absolute": (lambda f: index(f, "model.safetensors", "/tmp/x.safetensors"), PLACES),
    "folder": (lambda f: index(f, "sub/x.safetensors"), PLACES),
    "backslash": (lambda f: index(f, "..\\x.safetensors"), PLACES),
    "NUL": (lambda f: index(f, "x\0.safetensors"), PLACES),
    "pickle": (lambda f: index(f, "pytorch_model.bin"), PLACES),
    "system": (lambda f: index(f, "/proc/self/environ"), PLACES),
    "list": (lambda f: index(f, ["model.safetensors"]), PLACES),
    "nothing": (lambda f: index(f, None), PLACES),
    "empty name": (lambda f: index(f, ""), PLACES),
    "pipe": (lambda f: (os.mkfifo(f / "x.safetensors"), index(f, "x.safetensors")), PLACES),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "index is a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "it is a list, and no object"),
    "weights' name": (lambda f: changed(f, "config.json", transformers_weights="../x.safetensors"), PLACES),
    "deep": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "nested too deeply"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "it is a list, and no object"),
    "config is a pipe": (lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), "no such file"),
    "config is huge": (
        lambda f: (f / "config.json").write_text(" " * 20_000_001 + "{}"),
        "it has more than 20,000,000 bytes",
    ),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff\xff"}'), "cannot be read: .*codec"),
    "adapter beside": (
        lambda f: changed(f, "adapter_config.json", base_model_name_or_path="evil/base"),
        "holds an adapter, beside a model or alone\n  Set model to its base",
    ),
    "link": (lambda f: (f / "notes.txt").symlink_to("/etc/passwd"), r"notes.txt: is a link out of the checkpoint\n"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoints(copied, name, monkeypatch):
    """Refused before another library reads a file, or asks at the terminal whether code may run."""
    spoil, found = CHECKPOINTS[name]
    spoil(copied)
    for library in ("AutoConfig.for_model", "AutoImageProcessor.from_pretrained", "AutoTokenizer.from_pretrained"):
        monkeypatch.setattr(f"mantis_lite.models.checkpoint.{library}", None)
    with pytest.raises(RecipeError, match=rf"^model: {copied}.*{found}"):
        open_checkpoint(ModelRecipe(name=str(copied)))


def test_what_is_harmless_stays(copied, tmp_path):
    """Transformers' own attention, a path of the machine it was saved on, the hub's cache, an older index."""
    changed(copied, "config.json", attn_implementation="sdpa", auto_map={})
    gone = {"tokenizer_file": "/no/such/cache/tokenizer.json", "vocab_file": None}
    changed(copied, "tokenizer_config.json", special_tokens_map_file=f"{copied}/special_tokens_map.json", **gone)
    changed(copied, "pytorch_model.bin.index.json", weight_map={"a": "pytorch_model-1.bin"})
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in copied.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    for folder in (copied, snapshot):
        wanted = recipe(folder)
        load_model(open_checkpoint(wanted.model), wanted)


def test_weights_are_safetensors_or_none(copied):
    """A pickle is not opened, also not by a library that would take what it finds."""
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    wanted = recipe(copied)
    with pytest.raises(RecipeError, match=r"model: the weights of .* cannot be read: .*safetensors"):
        load_model(open_checkpoint(wanted.model), wanted)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "llava", "auto_map": CODE}, FOUND_CODE),
        ({"model_type": "evil"}, "cannot be read: Unrecognized model identifier"),
        ({}, "cannot be read: .*model_type"),
    ],
)
def test_the_config_beside_an_adapter_is_read_as_safely(tmp_path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=f"config.json.*{found}"):
        read_config(tmp_path)


@pytest.fixture(scope="module")
def trained(checkpoint_of, tmp_path_factory):
    """An adapter on the tiny LLaVA."""
    checkpoint = checkpoint_of("llava")
    wanted = recipe(checkpoint.name, lora={"r": 4}, trainable={"projector": "adapter"})
    model = make_trainable(load_model(checkpoint, wanted), wanted, checkpoint.family)
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "adapter")


def settings(folder: Path, **keys) -> None:
    changed(folder, "adapter_config.json", **keys)


def tensors(folder: Path, change) -> None:
    found = load_file(folder / WEIGHTS)
    first = next(name for name in found if ".lora_A." in name)
    change(found, first)
    save_file(found, folder / WEIGHTS)


def put(name, value):
    return lambda folder: tensors(folder, lambda found, first: found.update({name or first: value}))


EVIL = {"base_model_class": "Evil", "parent_library": "evil"}
SLOW, PLAIN = "has a pattern that may take for ever", "\n  Only the settings of plain LoRA and DoRA are read"
ADAPTERS = {
    "another method": (lambda f: settings(f, peft_type="VERA"), "peft_type is VERA\n  Only LORA is taken"),
    "imports a module": (lambda f: settings(f, auto_mapping=EVIL), "auto_mapping is {'base_model_class': 'Evil'"),
    "imports megatron": (lambda f: settings(f, megatron_config={"a": 1}, megatron_core="evil"), "megatron_config is"),
    "imports a core": (lambda f: settings(f, megatron_core="evil.core"), "megatron_core is 'evil.core'" + PLAIN),
    "unpickles for corda": (
        lambda f: settings(f, corda_config={"cache_file": "x.pt"}),
        "corda_config is {'cache_file'",
    ),
    "unpickles for eva": (lambda f: settings(f, eva_config={"rho": 2.0}), "eva_config is"),
    "unpickles for lora-ga": (lambda f: settings(f, lora_ga_config={"cache_file": "x.pt"}), "lora_ga_config is"),
    "loftq": (lambda f: settings(f, loftq_config={"loftq_bits": 4}), "loftq_config is"),
    "arrow": (lambda f: settings(f, arrow_config={"top_k": 3}), "arrow_config is"),
    "tokenizer": (lambda f: settings(f, tokenizer_kwargs={"trust_remote_code": True}), "tokenizer_kwargs is"),
    "runtime": (lambda f: settings(f, runtime_config={"ephemeral_gpu_offload": True}), "runtime_config is"),
    "invocation": (lambda f: settings(f, alora_invocation_tokens=[1]), "alora_invocation_tokens is"),
    "unknown": (lambda f: settings(f, run_this="x"), "run_this is 'x'" + PLAIN),
    "layers again and again": (lambda f: settings(f, layer_replication=[[0, 1]] * 9**5), "layer_replication is"),
    "rank": (lambda f: settings(f, r=10**9), "r is 1000000000: input should be less than or equal to 1024" + PLAIN),
    "rank of nothing": (lambda f: settings(f, r=0), "r is 0: "),
    "rank of minus": (lambda f: settings(f, r=-8), "r is -8: "),
    "rank in words": (lambda f: settings(f, r="8"), "r is '8': input should be a valid integer"),
    "rank by pattern": (lambda f: settings(f, rank_pattern={"q_proj": 10**8}), "rank_pattern is 100000000: "),
    "alpha": (lambda f: settings(f, lora_alpha=float("inf")), "lora_alpha is inf: input should be a finite"),
    "alpha without end": (lambda f: settings(f, lora_alpha=1e300), "lora_alpha is 1e[+]300: "),
    "dropout": (lambda f: settings(f, lora_dropout=1.0), "lora_dropout is 1.0: "),
    "bias": (lambda f: settings(f, bias="all"), "bias is 'all': input should be 'none'"),
    "start": (lambda f: settings(f, init_lora_weights="eva"), "init_lora_weights is 'eva': "),
    "targets": (lambda f: settings(f, target_modules={"a": 1}), "target_modules is {'a': 1}: "),
    "many targets": (lambda f: settings(f, target_modules=["q_proj"] * 20_000), "target_modules is "),
    "slow targets": (lambda f: settings(f, target_modules="(a+)+$"), f"target_modules {SLOW}: "),
    "slower targets": (lambda f: settings(f, target_modules=".*.*.*.*.*.*x"), f"target_modules {SLOW}"),
    "slow exceptions": (lambda f: settings(f, exclude_modules=["(.*a){20}"]), f"exclude_modules {SLOW}"),
    "slow ranks": (lambda f: settings(f, rank_pattern={"(a|a)*b": 4}), f"rank_pattern {SLOW}"),
    "no pattern": (lambda f: settings(f, target_modules="("), f"target_modules {SLOW}"),
    "tokens": (lambda f: settings(f, trainable_token_indices=[-1]), "trainable_token_indices is -1: "),
    "settings are a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "it is a list, and no object"),
    "settings are deep": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "nested too deeply"),
    "settings are a pipe": (
        lambda f: ((f / "adapter_config.json").unlink(), os.mkfifo(f / "adapter_config.json")),
        "cannot be read: no such file",
    ),
    "pickle": (
        lambda f: ((f / WEIGHTS).unlink(), (f / "adapter_model.bin").write_bytes(b"cos\nsystem\n.")),
        "adapter_model.bin: is a pickle",
    ),
    "weights are a pipe": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), f"has no {WEIGHTS}"),
    "weights are a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), f"has no {WEIGHTS}"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "is damaged: "),
    "a long header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "is damaged: .*[Hh]eader"),
    "empty": (lambda f: save_file({}, f / WEIGHTS), "holds no tensors"),
    "numbers": (put(None, torch.zeros(4, 32, dtype=torch.int8)), "is of I8, and no floating point number"),
    "another name": (put("model.lm_head.weight", torch.zeros(1)), "'model.lm_head.weight' is no name of an adapter's"),
    "rank of tensors": (put(None, torch.zeros(7, 32)), r"is of rank 4 and 7, by its settings \[4\]"),
    "rank of all": (lambda f: settings(f, r=8), r"is of rank 4, by its settings \[8\]"),
    "half": (lambda f: tensors(f, lambda found, first: found.pop(first)), "has one half of a LoRA"),
    "a weight of the base": (
        put("base_model.model.lm_head.weight", torch.zeros(321, 32)),
        "lm_head.weight is a whole weight, which modules_to_save does not name",
    ),
    "another base": (
        lambda f: settings(f, base_model_name_or_path="evil/base"),
        r"was trained on evil/base, and model is .*\n  Set model=evil/base; or, if that is the same model, model.any_",
    ),
    "another revision": (
        lambda f: settings(f, revision="v2"),
        r"was trained on revision v2 of its base, and model.revision is main\n  Set model.revision=v2; or, if",
    ),
}
assert len(ADAPTERS) >= 30


@pytest.mark.parametrize("name", ADAPTERS)
def test_hostile_adapters(adapter, llava_folder, name, monkeypatch):
    """Refused by their files alone, before PEFT sees them or a model is loaded."""
    spoil, found = ADAPTERS[name]
    spoil(adapter)
    for reader in ("PeftConfig.from_pretrained", "PeftModel.load_adapter", "PeftModel.from_pretrained"):
        monkeypatch.setattr(f"peft.{reader}", None)
    monkeypatch.setitem(sys.modules, "evil", None)
    with pytest.raises(RecipeError, match=found):
        find_adapter(str(adapter), base=ModelRecipe(name=str(llava_folder)))


LOADED = {
    "not finite": (
        lambda f: tensors(f, lambda found, first: found[first].fill_(torch.nan)),
        r"1 tensors of .* are not finite, first ",
    ),
    "another shape": (
        lambda f: tensors(f, lambda found, first: found.update({first: torch.zeros(4, 99)})),
        "does not fit this llava: .*size mismatch",
    ),
    "one layer more": (
        lambda f: tensors(
            f,
            lambda found, first: found.update(
                {first.replace("lora_A", half).replace("layers.0", "layers.9"): torch.zeros(4, 4) for half in HALVES}
            ),
        ),
        "2 tensors of .* have no place in this llava",
    ),
}
HALVES = ("lora_A", "lora_B")


@pytest.mark.parametrize("name", LOADED)
def test_adapters_that_do_not_fit_their_base(adapter, checkpoint, name):
    spoil, found = LOADED[name]
    spoil(adapter)
    model = load_model(checkpoint, recipe(checkpoint.name))
    with pytest.raises(RecipeError, match=f"model.adapter: .*{found}"):
        load_adapter(model, str(adapter))


def test_a_sound_adapter_is_read_by_every_key_it_has(adapter, llava_folder):
    """What PEFT writes of a LoRA is taken, and comes to the same settings."""
    read = LoraConfig(**read_settings(adapter / "adapter_config.json"))
    whole = LoraConfig.from_pretrained(adapter)
    assert {k: v for k, v in read.to_dict().items() if k != "runtime_config"} == whole.to_dict()
    assert find_adapter(str(adapter), base=ModelRecipe(name=str(llava_folder))) == adapter
    check_tensors(adapter / WEIGHTS, read_settings(adapter / "adapter_config.json"))


@pytest.mark.parametrize(
    ("trained_on", "model", "same"),
    [
        ("a/b", "a/b", True),
        ("a/b", "c/b", False),
        ("/home/ann/b", "a/b", True),
        ("/home/ann/c", "a/b", False),
        ("b", "a/b", True),
        (None, "a/b", True),
        ("tiny", "tiny", True),
    ],
)
def test_a_base_is_known_by_its_name(adapter, trained_on, model, same):
    """On the hub by its whole name, of a folder by the last one: where that lies is another matter on each machine."""
    settings(adapter, base_model_name_or_path=trained_on)
    find_adapter(str(adapter), base=ModelRecipe(name=model, any_base=True))
    find_adapter(str(adapter))
    if same:
        find_adapter(str(adapter), base=ModelRecipe(name=model))
    else:
        with pytest.raises(RecipeError, match=f"was trained on {trained_on}, and model is {model}"):
            find_adapter(str(adapter), base=ModelRecipe(name=model))


def test_a_revision_is_known_by_its_name(adapter):
    settings(adapter, base_model_name_or_path="a/b", revision="v2")
    find_adapter(str(adapter), base=ModelRecipe(name="a/b", revision="v2"))
    settings(adapter, revision="main")
    find_adapter(str(adapter), base=ModelRecipe(name="a/b"))


def test_any_base_needs_an_adapter():
    with pytest.raises(RecipeError, match=r"model.any_base: has no effect without model.adapter\n  Leave it out."):
        make_recipe({"model": {"name": "a/b", "any_base": True}, "data": "x.json", "run_dir": "r"})


def test_a_small_file_that_is_sound(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_small(tmp_path / "a.json") == {"a": [1]}
