"""Checkpoints are loaded whole, in 4 bits where asked for, or refused with what is wrong."""

import json
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers import chat, recipe
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from torch import nn

from mantis_lite.data.collate import collate
from mantis_lite.data.schema import parse
from mantis_lite.errors import RecipeError
from mantis_lite.models.adapters import make_trainable, part_sizes
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import load_model
from mantis_lite.recipe import ModelRecipe
from mantis_lite.recipe_file import find_recipe


@pytest.fixture
def copied(llava_folder, tmp_path):
    return shutil.copytree(llava_folder, tmp_path / "copied")


def opened(name, **settings):
    wanted = recipe(name, **settings)
    return load_model(open_checkpoint(wanted.model), wanted)


@pytest.fixture
def in_4_bits(checkpoint):
    return load_model(checkpoint, recipe(checkpoint.name, method="qlora"))


def test_only_the_language_model_is_in_4_bits(in_4_bits):
    linear = {name: module for name, module in in_4_bits.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, module in linear.items() if isinstance(module, Linear4bit)}
    assert quantized == {name for name in linear if name.startswith("model.language_model.layers.")}
    assert len(quantized) == 14 and "lm_head" in linear
    assert {p.quant_type for name, m in linear.items() if name in quantized for p in [m.weight]} == {"nf4"}


def test_a_4_bit_weight_counts_as_the_parameters_it_stands_for(checkpoint, in_4_bits):
    whole = load_model(checkpoint, recipe(checkpoint.name))
    in_4, in_32 = (part_sizes(model, checkpoint.family) for model in (in_4_bits, whole))
    assert [size.parameters for size in in_4] == [size.parameters for size in in_32]


def test_qlora_learns(in_4_bits, checkpoint, encoder):
    model = make_trainable(in_4_bits, recipe(checkpoint.name, method="qlora"), checkpoint.family).train()
    row = chat("What is <image>?", "small red circle", images=(1,))
    batch = collate([encoder.encode(parse(row, "rows:1", None))])
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_kernel_for_attention_that_is_not_here_is_refused(checkpoint):
    """Also for a run that was trained elsewhere, and is only predicted with."""
    with pytest.raises(
        RecipeError, match=r"memory.attention: varlen, but there is no GPU\n  Set memory.attention=auto"
    ):
        load_model(checkpoint, recipe(checkpoint.name, memory={"attention": "varlen"}))


@pytest.mark.parametrize(
    ("asked", "found"),
    [("auto", "mantis_segment"), ("segment", "mantis_calls"), ("sdpa", "sdpa"), ("eager", "eager")],
)
def test_attention_is_the_recipes(checkpoint, asked, found):
    model = load_model(checkpoint, recipe(checkpoint.name, memory={"attention": asked}))
    assert model.get_decoder().config._attn_implementation == found


def without(tensors: dict) -> str:
    del tensors["multi_modal_projector.linear_1.weight"]
    return "1 missing keys, first model.multi_modal_projector.linear_1.weight"


def with_one_more(tensors: dict) -> str:
    tensors["language_model.model.extra.weight"] = torch.zeros(1)
    return "1 unexpected keys, first model.language_model.extra.weight"


@pytest.mark.parametrize("spoil", [without, with_one_more], ids=["missing", "unexpected"])
def test_weights_that_do_not_fit(copied, spoil):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    message = spoil(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError) as caught:
        opened(copied)
    fault = f"model: the weights of {copied} do not fit the architecture: {message}"
    assert str(caught.value) == f"{fault}\n  Take the checkpoint as it was published."


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def of_other_words(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.lm_head.weight"] = torch.zeros(7, 32)
    save_file(tensors, file, metadata={"format": "pt"})


def of_another_start(folder):
    """A tokenizer as transformers saves one with legacy=False: a leading blank before the first stretch alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("Ġ", prepend_scheme="first")
    tokenizer.save(str(folder / "tokenizer.json"))


def without_the_placeholder(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<image>"', '"<photo>"'))


def broken(name):
    return lambda folder: (folder / name).write_text('{"broken"')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken("config.json"), r"model: .*config.json cannot be read: Expecting ':' delimiter"),
        (broken("preprocessor_config.json"), r"model: .*preprocessor_config.json cannot be read: "),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            r"model: .*preprocessor_config.json cannot be read",
        ),
        (broken("tokenizer.json"), r"model: .*tokenizer.json cannot be read: "),
        (
            without_the_placeholder,
            r"model: the tokenizer of .* lacks <image>, which stands for a picture\n  Take the check",
        ),
        (
            of_another_start,
            r"model: its tokenizer writes text at the start of a prompt otherwise than further on\n  Take",
        ),
        (cut, r"model: the weights of .* cannot be read: .*\n  Take the checkpoint as it was published"),
        (of_other_words, r"model: the weights of .* cannot be read: .*\n  Take the checkpoint as it was published"),
    ],
    ids=["config", "processor", "no processor", "tokenizer", "placeholder", "start", "cut", "words"],
)
def test_a_damaged_checkpoint_is_named(copied, spoil, message):
    spoil(copied)
    with pytest.raises(RecipeError, match=message):
        wanted = recipe(copied)
        checkpoint = open_checkpoint(wanted.model)
        checkpoint.encoder(wanted)
        load_model(checkpoint, wanted)


SUPPORTED = "trained here: llava, idefics2, fuyu, idefics3, smolvlm, qwen2_vl, qwen2_5_vl, qwen3_vl"


@pytest.mark.parametrize(
    ("model_type", "nearest"),
    [
        ("llava_next", "chat-siglip-llama3-qlora"),
        ("video_llava", "chat-idefics2-qlora"),
        ("internvl", "chat-qwen25vl-qlora"),
        ("internvl_chat", "chat-qwen25vl-qlora"),
        ("bert", "chat"),
    ],
)
def test_another_architecture(copied, model_type, nearest):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(RecipeError) as caught:
        open_checkpoint(ModelRecipe(name=str(copied)))
    fault = f"model: {copied} is of type {model_type}; {SUPPORTED}\n  The nearest recipe is {nearest};"
    assert str(caught.value).startswith(fault)
    find_recipe(nearest)


def test_a_folder_without_a_model(tmp_path):
    """OpenFlamingo's, for one: a checkpoint.pt and no config.json."""
    with pytest.raises(RecipeError, match=rf"has no config\.json; {SUPPORTED}\n  Name a model on the hub, or a folder"):
        open_checkpoint(ModelRecipe(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "is neither a folder here nor a model on the hub\n  Check the spelling"),
        ("no such name!", "is neither a folder here nor a model on the hub\n  Check the spelling"),
        ("nobody/nothing", "is not in the cache, and the hub cannot be reached\n  Connect, or set model to a folder"),
    ],
    ids=["folder", "name", "offline"],
)
def test_a_model_that_is_not_there(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RecipeError) as caught:
        open_checkpoint(ModelRecipe(name=name))
    assert str(caught.value).startswith(f"model: {name} {message}")
