"""Layers in one kernel compute what they did; which are, which are not and why is said."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers import chat, recipe
from peft import LoraConfig, get_peft_model
from test_isolation import batch_of, loss_and_gradient, samples_of
from torch import nn

from mantis_lite.data.collate import collate
from mantis_lite.errors import RecipeError
from mantis_lite.models.adapters import make_trainable
from mantis_lite.models.kernels import KERNELS, Layers, chosen_kernels, fuse, fused_layers, words
from mantis_lite.models.load import load_model

ROWS = [chat("a b c", "d e f", images=(1, 2)), chat("g", "h i j k")]

LANGUAGE = {"rms_norm": 5, "rope": 2, "swiglu": 2}
LAYERS = {
    "llava": {"language model": LANGUAGE, "vision tower": {"layer_norm": 7}},
    "idefics2": {
        "language model": LANGUAGE,
        "vision tower": {"layer_norm": 5},
        "projector": {"rms_norm": 4, "swiglu": 2},
    },
    "idefics3": {"language model": LANGUAGE, "vision tower": {"layer_norm": 5}},
    "smolvlm": {"language model": LANGUAGE, "vision tower": {"layer_norm": 5}},
    "qwen2_vl": {"language model": LANGUAGE, "vision tower": {"layer_norm": 6}, "projector": {"layer_norm": 1}},
    "qwen2_5_vl": {
        "language model": LANGUAGE,
        "vision tower": {"rms_norm": 6, "swiglu": 3},
        "projector": {"rms_norm": 1},
    },
    "qwen3_vl": {
        "language model": LANGUAGE | {"rms_norm": 9},  # its queries and keys have norms too
        "vision tower": {"layer_norm": 6},
        "projector": {"layer_norm": 2},
    },
    "fuyu": {"language model": {"rope": 2, "layer_norm": 9, "relu_squared": 2}},
}


def trainable(checkpoint, **settings):
    made = recipe(checkpoint.name, memory={"kernels": "off"}, **settings)
    return make_trainable(load_model(checkpoint, made), made, checkpoint.family)


def test_layers_are_known_by_what_they_are(checkpoint_of, family):
    """In every part and whatever a family calls them; that they compute the same, tests/test_gpu.py shows."""
    checkpoint = checkpoint_of(family)
    model = load_model(checkpoint, recipe(checkpoint.name, memory={"kernels": "off"}))
    off = dict.fromkeys(KERNELS, "switched off")
    before = fused_layers(model, checkpoint.family, off)
    fuse(model, KERNELS)
    after = fused_layers(model, checkpoint.family, off)
    assert [layers._replace(why_not=None) for layers in before] == after
    assert all(layers.why_not == "switched off" for layers in before)
    found: dict[str, dict[str, int]] = {}
    for kernel, part, count, _ in after:
        found.setdefault(part, {})[kernel] = count
    assert found == LAYERS[family]


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_has_a_switch(checkpoint_of, kernel):
    checkpoint = checkpoint_of("fuyu" if kernel == "relu_squared" else "llava")
    model = trainable(checkpoint)
    fuse(model, [kernel])
    switches = {name: None if name == kernel else "switched off" for name in KERNELS}
    layers = fused_layers(model, checkpoint.family, switches)
    assert {found.kernel for found in layers if found.why_not is None} == {kernel}
    assert all(found.why_not == "switched off" for found in layers if found.kernel != kernel)


def test_only_this_model_is_changed(checkpoint_of):
    def forwards(model) -> list:
        return [vars(module).get("forward") for module in model.get_decoder().modules()]

    checkpoint = checkpoint_of("llava")
    model, other = trainable(checkpoint), trainable(checkpoint)
    before, of_other = forwards(model), forwards(other)
    fuse(model, KERNELS)
    assert forwards(model) != before and forwards(other) == of_other


@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.0), ("qlora", 0.3)])
def test_lora_in_one_product_is_pefts(checkpoint_of, encoder_of, family, method, dropout):
    checkpoint, encoder = checkpoint_of(family), encoder_of(family)
    adapted = {"language_model": "adapter", "projector": "adapter"} | (
        {} if family == "fuyu" else {"vision_tower": "adapter"}
    )
    model = trainable(checkpoint, method=method, trainable=adapted, lora={"r": 4, "alpha": 7, "dropout": dropout})
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    other = deepcopy(model)
    fuse(other, ["lora"])
    layers = fused_layers(other, checkpoint.family, dict.fromkeys(KERNELS))
    assert all(found.why_not is None for found in layers if found.kernel == "lora")
    batch = batch_of(encoder, samples_of(encoder, ROWS))
    found = []
    for each in (model, other):
        torch.manual_seed(1)  # of what is dropped
        found.append(loss_and_gradient(each.train(), [batch]))
    (plain, gradient), (ours, theirs) = found
    assert ours == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(theirs, gradient, rtol=1e-4, atol=1e-6)


def test_lora_in_16_bits_is_as_near_as_pefts(checkpoint_of):
    """Against float64: autocast, with PEFT's adapters in float32."""
    model = trainable(checkpoint_of("llava"), method="lora", lora={"r": 4})
    layer = model.get_decoder().layers[0].mlp.down_proj
    nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    torch.manual_seed(0)
    x = torch.randn(1, 64, layer.in_features)
    exact = deepcopy(layer).double()(x.double())
    errors = []
    for fused in (False, True):
        if fused:
            fuse(layer, ["lora"])
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((layer(x) - exact).norm() / exact.norm())
    assert errors[1] < 1.2 * errors[0] < 0.02


def test_lora_that_is_switched_off_is_the_base(checkpoint_of, encoder_of):
    checkpoint, encoder = checkpoint_of("llava"), encoder_of("llava")
    model = trainable(checkpoint, method="lora").eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    batch = collate(samples_of(encoder, ROWS), encoder.vision.batch)
    plain, fused = model, deepcopy(model)
    fuse(fused, ["lora"])
    with torch.no_grad():
        with plain.disable_adapter(), fused.disable_adapter():
            torch.testing.assert_close(fused(**batch).logits, plain(**batch).logits, rtol=0, atol=0)
        adapted = fused(**batch).logits
        fused.merge_adapter()
        torch.testing.assert_close(fused(**batch).logits, adapted, rtol=1e-4, atol=1e-5)


def test_a_bias_that_trains_goes_on_training(checkpoint_of, encoder_of):
    """PEFT's bias="lora_only", in an adapter that is gone on with: fused, its gradient would be nothing."""
    checkpoint, encoder = checkpoint_of("qwen2_vl"), encoder_of("qwen2_vl")
    base = load_model(checkpoint, recipe(checkpoint.name)).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=2, bias="lora_only", target_modules=["q_proj", "o_proj"]))
    fuse(model, ["lora"])
    assert ("lora", "language model", 2, "on weights that train") in fused_layers(
        model, checkpoint.family, dict.fromkeys(KERNELS)
    )
    loss_and_gradient(model.train(), [batch_of(encoder, samples_of(encoder, ROWS))])
    biases = [weight for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name]
    assert biases and all(bias.grad is not None and bias.grad.abs().sum() > 0 for bias in biases)


def test_what_lora_is_left_to_peft_and_why(checkpoint_of):
    checkpoint = checkpoint_of("llava")
    model = trainable(checkpoint, method="lora", lora={"dora": True})
    fuse(model, ["lora"])
    layers = fused_layers(model, checkpoint.family, dict.fromkeys(KERNELS))
    assert Layers("lora", "language model", 14, "DoRA") in layers
    lines = list(words(layers))
    assert lines[0] == "layers in one kernel: none" and "14 lora of the language model (DoRA)" in lines[1]


def chosen(kernels, **settings):
    return chosen_kernels(recipe(memory={"kernels": kernels}, **settings))


def test_auto_takes_what_there_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert chosen("auto") == dict.fromkeys(KERNELS, "no NVIDIA GPU") | {"lora": None}
    assert chosen("off") == dict.fromkeys(KERNELS, "switched off")
    assert chosen(["lora"]) == dict.fromkeys(KERNELS, "switched off") | {"lora": None}
    with pytest.raises(RecipeError, match=r"memory.kernels: rope cannot run here: no NVIDIA GPU\n  Leave it out, or"):
        chosen(["rope", "lora"])


def test_liger_is_an_extra(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert set(chosen("auto").values()) == {None}
    assert chosen("auto", train={"use_cpu": True})["rope"] == "train.use_cpu"
    monkeypatch.setattr("mantis_lite.models.kernels.find_spec", lambda name: None)
    assert chosen("auto")["swiglu"] == "needs pip install 'mantis-lite[gpu]'"
    with pytest.raises(RecipeError, match=r"memory.kernels: swiglu cannot run here: needs pip install"):
        chosen(["swiglu"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernel"), [("llava", "rope"), ("qwen3_vl", "rope"), ("fuyu", "relu_squared")])
def test_liger_computes_the_same_in_tritons_interpreter(folder_of, name, kernel):
    """Where it can: rotary positions and squared ReLU; the others' kernels need a GPU (tests/test_gpu.py)."""
    script = Path(__file__).parent / "in_tritons_interpreter.py"
    command = [sys.executable, str(script), str(folder_of(name)), kernel]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "2"  # layers
