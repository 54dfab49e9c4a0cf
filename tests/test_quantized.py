"""Parts in 4 bits: which they are, that training on them is training on what they stand for, and what loading needs."""

import os
import shutil
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from helpers import chat, losses, recipe, train, write_rows
from torch import nn
from transformers import AutoConfig, LlavaForConditionalGeneration

from mantis_lite.data.collate import collate
from mantis_lite.data.schema import parse
from mantis_lite.models.adapters import make_trainable, part_of, part_sizes
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import load_model
from mantis_lite.recipe_file import make_recipe
from mantis_lite.training.start import start

ROWS = [chat("What is <image> beside <image>?", "red circle", images=(1, 2)), chat("Only words.", "No picture")]


def quantized(name, **settings):
    return recipe(name, method="qlora", **settings)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_parts_that_are_named_are_in_4_bits_and_no_other(checkpoint_of, family, count):
    """The original's list of what to leave out let the projector and lm_head be quantised unseen."""
    checkpoint = checkpoint_of(family)
    for parts in combinations(checkpoint.family.parts, count):
        asked = quantized(checkpoint.name, memory={"quantize": list(parts)})
        model = load_model(checkpoint, asked)
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        in_4_bits = {name for name, module in linear.items() if isinstance(module, Linear4bit)}
        assert in_4_bits == {n for n in linear if n != "lm_head" and part_of(n, checkpoint.family) in parts}
        whole = part_sizes(load_model(checkpoint, recipe(checkpoint.name)), checkpoint.family)
        for size, before in zip(part_sizes(model, checkpoint.family), whole, strict=True):
            assert (size.parameters, before.quantized) == (before.parameters, 0)
            held = [m.in_features * m.out_features for n, m in linear.items() if n in in_4_bits]
            here = [n for n in linear if n in in_4_bits and part_of(n, checkpoint.family) == size.part]
            assert size.quantized == sum(linear[n].in_features * linear[n].out_features for n in here)
            assert size.quantized <= sum(held)


def test_a_tower_with_a_pooling_head_is_in_4_bits_but_for_it(llava_folder, tmp_path):
    """As the published SigLIP towers have one, whose attention bitsandbytes leaves as it is."""
    shutil.copytree(llava_folder, tmp_path / "model")
    config = AutoConfig.from_pretrained(llava_folder)
    config.vision_config.vision_use_head = True
    LlavaForConditionalGeneration.from_pretrained(llava_folder, config=config).save_pretrained(tmp_path / "model")
    parts = ["language_model", "projector", "vision_tower"]
    asked = quantized(tmp_path / "model", memory={"quantize": parts})
    model = load_model(open_checkpoint(asked.model), asked)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    (head,) = [name for name in linear if name.endswith("head.attention.out_proj")]
    assert {name for name, module in linear.items() if not isinstance(module, Linear4bit)} == {head, "lm_head"}


def test_lora_on_4_bits_is_lora_on_the_weights_they_stand_for(checkpoint_of, encoder_of, family):
    """Loss and every gradient, all parts in 4 bits, against the same weights taken out of them."""
    checkpoint, encoder = checkpoint_of(family), encoder_of(family)
    parts = list(checkpoint.family.parts)
    trainable = dict.fromkeys(parts, "adapter")
    in_4 = quantized(checkpoint.name, memory={"quantize": parts}, trainable=trainable, lora={"init": "gaussian"})
    ours = make_trainable(load_model(checkpoint, in_4), in_4, checkpoint.family).train()
    whole = recipe(checkpoint.name, trainable=trainable)
    theirs = make_trainable(load_model(checkpoint, whole), whole, checkpoint.family).train()
    torch.manual_seed(0)
    others = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            others[name].weight.data.copy_(weight)
    adapters = {name: weight for name, weight in theirs.named_parameters() if "lora_" in name}
    for name, weight in ours.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1)
            adapters[name].data.copy_(weight)
    batch = collate([encoder.encode(parse(row, "rows:1", None)) for row in ROWS], encoder.vision.batch)
    losses = []
    for model in (ours, theirs):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    trained = {name: weight.grad for name, weight in ours.named_parameters() if weight.grad is not None}
    assert len(trained) == len([weight for weight in adapters.values() if weight.grad is not None]) > 10
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, adapters[name].grad, rtol=1e-2, atol=1e-4)


@pytest.fixture
def settings(llava_folder, tmp_path):
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,)) for i in range(12)]
    return {
        "model": str(llava_folder),
        "data": write_rows(tmp_path / "rows.jsonl", rows),
        "run_dir": str(tmp_path / "run"),
        "method": "qlora",
        "memory": {"quantize": ["language_model", "projector", "vision_tower"]},
        "packing": {"max_length": 256},
        "train": {"num_train_epochs": 4, "learning_rate": 3e-3, "samples_per_step": 4, "save_strategy": "no"},
    }


def test_the_table_is_the_same_after_a_resume(settings, tmp_path):
    from test_train import stopped

    saving = {"save_strategy": "steps", "save_steps": 2}
    made = make_recipe(settings | {"train": settings["train"] | saving})
    before = start(made).sizes
    assert all(size.quantized > 0 for size in before)
    assert {size.part for size in before if size.trainable} == {"language_model"}
    stopped(made, 2)
    assert start(made).sizes == before
    train(made)
    train(make_recipe(settings | {"run_dir": str(tmp_path / "straight")}))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimisers_with_small_or_paged_states_learn(settings, tmp_path, optimizer):
    """By the library's own name; large enough a tensor has its moments in 8 bits."""
    memory = settings["memory"] | {"optimizer": optimizer}
    run = start(make_recipe(settings | {"memory": memory, "lora": {"r": 256, "alpha": 256}}))
    run.train()
    kinds = {state["state1"].dtype for state in run.trainer.optimizer.state.values()}
    assert (torch.uint8 in kinds) == ("8bit" in optimizer)
    falling = losses(tmp_path / "run")
    assert falling[-1] < falling[0] - 0.05


LOADING = """
import sys, threading, time
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import load_model
from mantis_lite.recipe_file import make_recipe

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

settings = {"data": "x", "run_dir": "x", "method": "qlora"}
small = make_recipe(settings | {"model": sys.argv[1]})
load_model(open_checkpoint(small.model), small)  # what the libraries themselves hold
wanted = make_recipe(settings | {"model": sys.argv[2]})
checkpoint = open_checkpoint(wanted.model)
most, done = [before := held()], threading.Event()

def watch():
    while not done.is_set():
        most.append(held())
        time.sleep(0.001)

watching = threading.Thread(target=watch)
watching.start()
model = load_model(checkpoint, wanted)
done.set()
watching.join()
print(max(most) - before, held() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_needs_little_more_than_the_model_in_4_bits(llava_folder, tmp_path):
    """The largest file of the checkpoint on top of it, however large the whole: 300 MB here, in files of 30."""
    large = shutil.copytree(llava_folder, tmp_path / "large")
    config = AutoConfig.from_pretrained(llava_folder)
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "num_attention_heads": 8}
    config.text_config.update(text | {"num_key_value_heads": 8, "head_dim": 64})
    (large / "model.safetensors").unlink()
    LlavaForConditionalGeneration(config).save_pretrained(large, max_shard_size="30MB")
    files = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert len(files) > 8 and sum(files) > 290e6
    command = [sys.executable, "-c", LOADING, str(llava_folder), str(large)]
    # What is given back is to go back to the system: transformers loads in threads, each with memory of its own.
    plain = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | plain)
    assert done.returncode == 0, done.stderr
    most, model = map(int, done.stdout.splitlines()[-1].split())
    assert 40e6 < model < 100e6
    assert most < model + max(files) + 20e6
