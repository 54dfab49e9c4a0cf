"""What trains is what the recipe says, part by part; and what is saved is an ordinary PEFT adapter."""

import re
import subprocess
import sys

import pytest
import torch
from helpers import chat, recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mantis_lite.data.collate import collate
from mantis_lite.data.schema import parse
from mantis_lite.errors import RecipeError
from mantis_lite.models.adapters import make_trainable, part_of, part_sizes
from mantis_lite.models.levels import levels_of, look_up
from mantis_lite.models.llava import LLAVA
from mantis_lite.models.load import load_model

PARTS = ("language_model", "projector", "vision_tower")
ROW = chat("What is <image> beside <image>?", "small red circle", images=(1, 2))
EVERYTHING = {"language_model": "adapter", "projector": "full", "vision_tower": "adapter"}


@pytest.fixture
def made(checkpoint):
    """A model trainable under a recipe's settings."""

    def make(method="lora", **settings):
        wanted = recipe(checkpoint.name, method=method, **settings)
        torch.manual_seed(0)
        return make_trainable(load_model(checkpoint, wanted), wanted, checkpoint.family)

    return make


@pytest.fixture(scope="session")
def batch(encoder):
    return collate([encoder.encode(parse(ROW, "rows:1", None))])


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def steps(model, batch, count: int = 1, lr: float = 0.01) -> list[float]:
    """Train a little; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(count):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


CASES = {
    "lora": {},
    "projector adapter": {"trainable": {"projector": "adapter"}},
    "projector full": {"trainable": {"projector": "full"}},
    "tower adapter": {"trainable": {"vision_tower": "adapter"}},
    "tower alone": {"trainable": {"language_model": "frozen", "vision_tower": "adapter"}},
    "tower full": {"trainable": {"vision_tower": "full"}},
    "everything": {"trainable": EVERYTHING},
    "full": {"method": "full"},
    "full projector": {"method": "full", "trainable": {"language_model": "frozen"}},
    "full tower": {"method": "full", "trainable": {"vision_tower": "full"}},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_every_trained_part_moves_and_no_other(made, batch, settings):
    model = made(**settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps(model, batch, count=2)  # a LoRA's A moves once its B is no longer 0
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    parts = recipe(**settings).parts
    assert {part_of(name, LLAVA) for name in moved} == {part for part in PARTS if parts[part] != "frozen"}
    for part in PARTS:
        if parts[part] == "adapter":
            assert all("lora_" in name for name in moved if part_of(name, LLAVA) == part)
    # Of a tower trained in full, what lies after the last layer that is read cannot learn.
    unread = {name for name in trained(model) if re.search(r"vision_tower.*(layers\.2\.|post_layernorm)", name)}
    assert moved == trained(model) - unread
    assert not unread or parts["vision_tower"] == "full"


def test_the_layers_of_each_part(made):
    names = trained(made(trainable={"projector": "adapter", "vision_tower": "adapter"}))
    layers = {name.rpartition(".lora_")[0].partition("base_model.model.model.")[2] for name in names}
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    language = [*attention, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    tower = [*attention, "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    expected = {f"language_model.layers.{at}.{name}" for at in (0, 1) for name in language}
    expected |= {f"multi_modal_projector.linear_{at}" for at in (1, 2)}
    found = {name.replace("vision_tower.vision_model.", "vision_tower.") for name in layers}
    assert found == expected | {f"vision_tower.encoder.layers.{at}.{name}" for at in (0, 1) for name in tower}


def test_target_modules_of_ones_own(made):
    names = trained(made(lora={"target_modules": ["q_proj", "up_proj"]}))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "up_proj"}
    assert {part_of(name, LLAVA) for name in names} == {"language_model"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora": {"target_modules": ["q_proj", "qkv"]}},
            "lora.target_modules: the language_model has no linear layer qkv\n"
            "  It has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.",
        ),
        (
            {"lora": {"target_modules": ["linear_1"]}},
            "lora.target_modules: the language_model has no linear layer linear_1\n"
            "  It has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.",
        ),
    ],
    ids=["unknown", "another part's"],
)
def test_unknown_target_modules(made, settings, message):
    with pytest.raises(RecipeError) as caught:
        made(**settings)
    assert str(caught.value) == message


def test_target_modules_may_lie_in_different_parts(made):
    model = made(lora={"target_modules": ["q_proj", "linear_1"]}, trainable={"projector": "adapter"})
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "linear_1"}


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [({}, False), ({"method": "full"}, False), ({"trainable": {"vision_tower": "adapter"}}, True)],
    ids=["lora", "full", "tower adapter"],
)
def test_a_frozen_tower_records_nothing(made, batch, settings, recorded):
    model = made(**settings)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()  # what trainers do beside checkpointing
    model.train()
    seen = []
    parts = {name.rpartition("model.")[2]: module for name, module in model.named_modules()}
    parts["multi_modal_projector"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    model(**batch).loss.backward()
    assert seen == [recorded]
    assert any(parameter.grad is not None for parameter in parts["vision_tower"].parameters()) == recorded


@pytest.mark.parametrize(
    "lora", [{"dora": True}, {"rslora": True}, {"dropout": 0.1}, {"init": "olora"}], ids=lambda lora: next(iter(lora))
)
def test_kinds_of_lora_learn(made, batch, lora):
    model = made(lora={"r": 4, "alpha": 16} | lora).train()
    assert any("magnitude" in name for name in trained(model)) == bool(lora.get("dora"))
    scaling = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert scaling == {8.0 if lora.get("rslora") else 4.0}  # alpha / sqrt(r), else alpha / r
    dropout = {
        getattr(module.lora_dropout["default"], "p", 0) for module in model.modules() if hasattr(module, "lora_A")
    }
    assert dropout == {lora.get("dropout", 0)}
    losses = steps(model, batch, count=5)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_part_sizes(made, settings):
    model = made(**settings)
    sizes = {size.part: size for size in part_sizes(model, LLAVA)}
    assert tuple(sizes) == PARTS
    once = [p.numel() for name, p in model.named_parameters() if ".original_module." not in name]  # PEFT keeps it
    assert sum(size.parameters for size in sizes.values()) == sum(once)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(size.trainable for size in sizes.values()) == count
    for part, training in recipe(**settings).parts.items():
        assert (sizes[part].trainable > 0) == (training != "frozen")


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def numbers_in(batch, checkpoint) -> torch.Tensor:
    """A batch's pictures as plain clients have them, in floating point."""
    return look_up(batch["pixel_values"], levels_of(checkpoint.image_processor))


SAVED = {
    "lora": {},
    "dora": {"lora": {"dora": True}},
    "everything": {"trainable": EVERYTHING},
    "gaussian": {"lora": {"init": "gaussian"}},
    "pissa": {"lora": {"init": "pissa"}},
    "olora": {"lora": {"init": "olora"}},
    "orthogonal": {"lora": {"init": "orthogonal", "r": 8}},
}


@pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED)
def test_a_saved_adapter_is_what_was_trained(made, checkpoint, batch, tmp_path, settings):
    model = made(**settings)
    steps(model, batch, count=2)
    model.save_pretrained(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(checkpoint.name, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    in_numbers = batch | {"pixel_values": numbers_in(batch, checkpoint)}
    torch.testing.assert_close(logits_of(loaded, in_numbers), logits_of(model, batch), rtol=0, atol=1e-4)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert any("multi_modal_projector" in name for name in names) == ("trainable" in settings)


IN_A_PROCESS = """
import sys, torch
sys.modules["mantis_lite"] = None  # not to be imported
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base, adapter, tensors = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
found = torch.load(tensors)
with torch.no_grad():
    logits = model(input_ids=found["input_ids"], pixel_values=found["pixel_values"]).logits
torch.testing.assert_close(logits, found["logits"], rtol=0, atol=1e-4)
"""


def test_an_adapter_needs_no_mantis_lite(made, checkpoint, batch, tmp_path):
    model = made(lora={"dora": True}, trainable=EVERYTHING)
    steps(model, batch, count=2)
    model.save_pretrained(tmp_path / "adapter")
    kept = {"input_ids": batch["input_ids"], "pixel_values": numbers_in(batch, checkpoint)}
    torch.save(kept | {"logits": logits_of(model, batch)}, tmp_path / "tensors")
    command = [sys.executable, "-I", "-c", IN_A_PROCESS, checkpoint.name, tmp_path / "adapter", tmp_path / "tensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
