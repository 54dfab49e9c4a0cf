"""What is computed again or a tile at a time changes no gradient, and keeps less."""

from copy import deepcopy

import pytest
import torch
from helpers import chat, recipe

from mantis_lite.data.collate import collate
from mantis_lite.data.schema import parse
from mantis_lite.models import activations
from mantis_lite.models.activations import checkpointed_layers, decoder_layers
from mantis_lite.models.adapters import make_trainable
from mantis_lite.models.load import load_model
from mantis_lite.recipe import MemoryRecipe

ROWS = [chat("What is <image> beside <image>?", "red circle", images=(1, 2)), chat("Only words.", "No picture")]
KEPT = {
    "all": {"checkpointing": "off"},
    "one layer less": {"checkpointing": 1},
    "inputs": {"checkpointing": "full"},
    "tiles": {"checkpointing": "off", "mlp_tile": 16},
    "inputs, tiles": {"checkpointing": "full", "mlp_tile": 16},
}


def trained(checkpoint, encoder, memory, **settings):
    """Loss, gradients by name, and the bytes kept between the two passes."""
    asked = recipe(checkpoint.name, memory=memory, **settings)
    torch.manual_seed(0)
    model = make_trainable(load_model(checkpoint, asked), asked, checkpoint.family).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    batch = collate([encoder.encode(parse(row, "rows:1", None)) for row in ROWS], encoder.vision.batch)
    kept: dict[int, int] = {}
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.item(), gradients, sum(kept.values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_gradient_changes_and_less_is_kept(checkpoint_of, encoder_of, family, method):
    lora = {"lora": {"dropout": 0.0}} if method == "lora" else {}
    found = {
        name: trained(checkpoint_of(family), encoder_of(family), memory, method=method, **lora)
        for name, memory in KEPT.items()
    }
    loss, gradients, _ = found["all"]
    for other, theirs, _ in found.values():
        assert other == pytest.approx(loss, abs=1e-6) and theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6)
    kept = {name: size for name, (_, _, size) in found.items()}
    assert kept["inputs"] < kept["one layer less"] < kept["all"] and kept["tiles"] < kept["all"]


@pytest.mark.parametrize(("memory", "times"), [("inputs", 2), ("tiles", 2), ("inputs, tiles", 2), ("all", 1)])
def test_a_tile_is_computed_again_once(checkpoint_of, encoder_of, memory, times):
    """Also where its layer is: three times would be once for nothing."""
    made = recipe(checkpoint_of("llava").name, memory=KEPT[memory], method="lora")
    model = make_trainable(load_model(checkpoint_of("llava"), made), made, checkpoint_of("llava").family).train()
    tokens = []
    for layer in decoder_layers(model):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[1]))
    encoder = encoder_of("llava")
    batch = collate([encoder.encode(parse(row, "rows:1", None)) for row in ROWS], encoder.vision.batch)
    model(**batch).loss.backward()
    assert sum(tokens) == times * batch["input_ids"].shape[1] * len(decoder_layers(model))
    assert max(tokens) == 16 if "tiles" in memory else len(tokens) == times * len(decoder_layers(model))


def test_dropout_is_the_same_when_a_tile_is_computed_again(checkpoint_of, encoder_of):
    """A gradient of another mask would be that of another loss: numbers of the loss against its own gradient."""
    settings = {"method": "lora", "lora": {"dropout": 0.5}}
    one = trained(checkpoint_of("llava"), encoder_of("llava"), KEPT["inputs, tiles"], **settings)
    two = trained(checkpoint_of("llava"), encoder_of("llava"), KEPT["tiles"], **settings)
    assert one[0] == pytest.approx(two[0], abs=1e-6)
    for name, gradient in one[1].items():
        torch.testing.assert_close(two[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_long_row_goes_through_mlps_in_stretches(checkpoint_of, encoder_of, monkeypatch):
    """On a CPU, or as tiles: the same loss and gradients, in a copy of the model as well, and few tokens at once."""
    sample = encoder_of("llava").encode(parse(chat("Hi", "word " * 40), "rows:1", None))
    found = []
    for stretch, memory in ((activations.CPU_STRETCH, {}), (16, {}), (16, {"mlp_tile": 16})):
        monkeypatch.setattr(activations, "CPU_STRETCH", stretch)
        asked = recipe(method="full", memory={"kernels": "off"} | memory)
        model = deepcopy(load_model(checkpoint_of("llava"), asked, dtype=torch.float32))
        seen = []
        for layer in decoder_layers(model):
            layer.mlp.gate_proj.register_forward_hook(lambda _, given, out, seen=seen: seen.append(out.shape[1]))
        loss = model(**collate([sample])).loss
        loss.backward()
        assert max(seen) == min(stretch, len(sample))
        found.append((loss, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert len(found[0]) > 10
    for whole, *others in zip(*found, strict=True):
        for split in others:
            torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)


def test_which_layers(checkpoint_of, monkeypatch):
    model = load_model(checkpoint_of("llava"), recipe(memory={"checkpointing": 1}))
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, False]
    assert checkpointed_layers(MemoryRecipe()) == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert checkpointed_layers(MemoryRecipe()) is None
    assert checkpointed_layers(MemoryRecipe(checkpointing="off")) == 0
