"""What only a GPU can show: the variable-length kernel, 16 bits, 4 bits, and training end to end."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import recursively_apply, send_to_device
from helpers import chat, losses, picture, recipe, write_rows
from safetensors.torch import load_file
from transformers import TrainerCallback

from mantis_lite.chat import MantisChat
from mantis_lite.data.collate import collate
from mantis_lite.data.schema import parse
from mantis_lite.errors import DivergedError, Stopped
from mantis_lite.merge import merge
from mantis_lite.models.activations import decoder_layers
from mantis_lite.models.adapters import make_trainable
from mantis_lite.models.kernels import KERNELS, fuse
from mantis_lite.models.load import load_model
from mantis_lite.prefill import log_likelihoods, read
from mantis_lite.recipe_file import make_recipe
from mantis_lite.scoring import predict
from mantis_lite.training.checkpoints import newest
from mantis_lite.training.start import start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [5, 130, 1, 64]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_packed_equals_separate(checkpoint_of, encoder_of, family, dtype, bound):
    checkpoint, encoder = checkpoint_of(family), encoder_of(family)
    rows = [chat("a b c", "d e f", images=(1, 2)), chat("g", "h i j k"), chat("l m", "n", images=(3,))]
    encoded = [encoder.encode(parse(row, "row", None)) for row in rows]
    model = load_model(checkpoint, recipe(checkpoint.name)).to("cuda", dtype)

    def total(samples):
        batch = send_to_device(collate(samples, encoder.vision.batch), "cuda")
        batch = recursively_apply(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
        return model(**batch, num_items_in_batch=1).loss

    together, apart = total(encoded), sum(total([sample]) for sample in encoded)
    assert together.item() == pytest.approx(apart.item(), rel=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
def test_prompts_read_in_a_pack_are_as_each_alone(checkpoint_of, encoder_of, family, dtype, bound):
    """By the kernels of packs, with keys and values kept: the same logits, and options as likely."""
    checkpoint, encoder = checkpoint_of(family), encoder_of(family)
    rows = [chat("a b c", "d", images=(1, 2)), chat("g", "h"), chat("l m", "n", images=(3,))]
    samples = [parse(row, "row", None) for row in rows]
    prompts = [encoder.encode_prompt(replace(sample, turns=sample.turns[:1])) for sample in samples]
    model = load_model(checkpoint, recipe(checkpoint.name)).to("cuda", dtype).eval()
    options = [[[5, 6, 7], [8]]] * len(prompts)
    together = read(model, encoder, prompts)
    likely = log_likelihoods(model, together, options)
    for at, prompt in enumerate(prompts):
        alone = read(model, encoder, [prompt])
        torch.testing.assert_close(together.logits[at], alone.logits[0], atol=bound, rtol=bound)
        assert likely[at] == pytest.approx(log_likelihoods(model, alone, options[:1])[0], abs=10 * bound)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_each_kernel_gives_the_same_loss_and_gradients(checkpoint_of, encoder_of, family, kernel, dtype, bound):
    """Every parameter trains, so that every layer's gradient is looked at."""
    if kernel != "lora":
        pytest.importorskip("liger_kernel")
    checkpoint, encoder = checkpoint_of(family), encoder_of(family)
    rows = [chat("a b c", "d e f", images=(1, 2)), chat("g", "h i j k")]
    batch = collate([encoder.encode(parse(row, "row", None)) for row in rows], encoder.vision.batch)
    batch = recursively_apply(lambda t: t.to(dtype) if t.is_floating_point() else t, send_to_device(batch, "cuda"))
    made = recipe(checkpoint.name, method="lora", memory={"kernels": "off"}, lora={"r": 4})
    model = make_trainable(load_model(checkpoint, made), made, checkpoint.family)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
        weight.requires_grad_(kernel != "lora" or "lora_" in name)
    model.to("cuda", dtype).train()
    found = []
    for fused in (False, True):
        if fused:
            fuse(model, [kernel])
            if not any(hasattr(module, "computed_by") for module in model.modules()):
                pytest.skip(f"{family} has no such layer")
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (plain, gradient), (ours, theirs) = found
    assert ours == pytest.approx(plain, rel=bound)
    assert (gradient - theirs).norm() < bound * 10 * gradient.norm()


def test_auto_fuses_all_that_can_be(folder_of, family, tmp_path):
    pytest.importorskip("liger_kernel")
    settings = {
        "model": str(folder_of(family)),
        "data": write_rows(tmp_path / "rows.jsonl", [chat("a", "b", images=(1,))]),
        "run_dir": str(tmp_path / "run"),
        "train": {"max_steps": 1},
    }
    assert not [notice for notice in start(make_recipe(settings)).notices if "not in one kernel" in notice]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_training_lowers_the_loss(folder_of, family, tmp_path, method):
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,)) for i in range(24)]
    settings = {
        "model": str(folder_of(family)),
        "data": write_rows(tmp_path / "rows.jsonl", rows),
        "run_dir": str(tmp_path / "run"),
        "method": method,
        "packing": {"max_length": 400},
        "train": {"num_train_epochs": 8, "learning_rate": 3e-3, "samples_per_step": 8, "save_strategy": "no"},
    }
    run = start(make_recipe(settings))
    assert run.trainer.args.bf16 and all(layer.gradient_checkpointing for layer in decoder_layers(run.trainer.model))
    run.train()
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_score_head_learns_and_predicts(folder_of, family, tmp_path, method):
    """In packs on the GPU, the head in float32; what a fresh load predicts is what the trained model does."""
    rows = [chat("a", "b", images=(at,)) | {"label": float(at % 2)} for at in range(24)]
    for row in rows:
        del row["messages"]
    settings = {
        "model": str(folder_of(family)),
        "data": write_rows(tmp_path / "rows.jsonl", rows),
        "run_dir": str(tmp_path / "run"),
        "task": "classify",
        "head": {"problem": "regression"},
        "method": method,
        "packing": {"max_length": 400},
        "train": {"num_train_epochs": 12, "learning_rate": 3e-3, "samples_per_step": 8, "save_strategy": "no"},
    }
    run = start(make_recipe(settings))
    heads = [weight for name, weight in run.trainer.model.named_parameters() if "score" in name]
    assert heads and all(weight.dtype == torch.float32 for weight in heads)
    run.train()
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert losses[-1] < 0.8 * losses[0]
    packed = predict(tmp_path / "run", [f"data={settings['data']}"])
    alone = predict(tmp_path / "run", [f"data={settings['data']}", "packing=off"], output=tmp_path / "alone.jsonl")
    torch.testing.assert_close(*map(torch.from_numpy, (packed.logits, alone.logits)), rtol=0.05, atol=0.05)


class At(TrainerCallback):
    """Does something as a step begins."""

    def __init__(self, step: int, does) -> None:
        self.step, self.does = step, does

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.does()


def of_steps(folder, tmp_path, name: str, **train) -> dict:
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,)) for i in range(12)]
    own = {"max_steps": 6, "learning_rate": 0.01, "samples_per_step": 4, "save_steps": 1, "warmup_steps": 0}
    data = write_rows(tmp_path / f"{name}.jsonl", rows)
    settings = {"model": str(folder), "data": data, "run_dir": str(tmp_path / name), "lora": {"dropout": 0.1}}
    return settings | {"method": "lora", "packing": {"max_length": 256}, "train": own | train}


def train_of(settings, *callbacks):
    run = start(make_recipe(settings))
    for callback in callbacks:
        run.trainer.add_callback(callback)
    return run, run.train()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_that_a_signal_stopped_goes_on_as_if_it_had_not(llava_folder, tmp_path, monkeypatch, deterministic):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    more = {"full_determinism": deterministic}
    _, straight = train_of(of_steps(llava_folder, tmp_path, "straight", **more))
    settings = of_steps(llava_folder, tmp_path, "stopped", **more)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM: saved .*checkpoint-3"):
        train_of(settings, At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    _, resumed = train_of(settings)
    np.testing.assert_allclose(losses(tmp_path / "stopped"), losses(tmp_path / "straight"), atol=1e-3)
    if deterministic:
        found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (resumed, straight))
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_gradient_that_is_no_number_is_not_stepped_with(llava_folder, tmp_path, dtype):
    """In float16 it is the loss scale's own matter, and counted as none of ours."""
    settings = of_steps(llava_folder, tmp_path, "run", bf16=dtype == "bf16", fp16=dtype == "fp16")
    run = start(make_recipe(settings))
    parameters, before = run.trainer.numbers.parameters, []

    def spoil():
        before.extend(p.detach().clone() for p in parameters)
        handle = parameters[-1].register_hook(lambda gradient: (handle.remove(), gradient * torch.inf)[1])

    def compare():
        assert all(torch.equal(*pair) for pair in zip(before, parameters, strict=True))

    for callback in (At(3, spoil), At(4, compare)):
        run.trainer.add_callback(callback)
    folder = run.train()
    assert len(before) and all(
        value.isfinite().all() for value in load_file(folder / "adapter_model.safetensors").values()
    )
    assert (tmp_path / "run/skipped.jsonl").exists() == (dtype == "bf16")


def test_weights_that_are_lost_end_the_run(llava_folder, tmp_path):
    run = start(make_recipe(of_steps(llava_folder, tmp_path, "run")))
    run.trainer.add_callback(At(4, lambda: run.trainer.numbers.parameters[0].data.fill_(torch.nan)))
    with pytest.raises(DivergedError, match="weights are no longer finite"):
        run.train()
    assert newest(tmp_path / "run")[0].name == "checkpoint-3"


def trained(folder_of, family, tmp_path, method) -> Path:
    rows = [chat(f"what is <image> next to {i}?", f"number {i} is red", images=(i,)) for i in range(6)]
    data = {"sources": write_rows(tmp_path / "rows.jsonl", rows), "eval": 0.3}
    own = {"max_steps": 2, "learning_rate": 0.05, "samples_per_step": 4, "save_strategy": "no"}
    found = {"model": str(folder_of(family)), "data": data, "run_dir": str(tmp_path / "run"), "method": method}
    start(make_recipe(found | {"train": own, "packing": {"max_length": 512}})).train()
    return tmp_path / "run"


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_merged_model_says_what_its_adapter_does(folder_of, family, tmp_path, method):
    """In 16 bits a choice between two close tokens may fall otherwise: it is the distance that is looked at."""
    run = trained(folder_of, family, tmp_path, method)
    found = merge(run, tmp_path / "merged", least=0.0)
    assert found.agreement.share > 0.9 and found.agreement.kl < 1e-2
    if method == "qlora":
        other = merge(run, tmp_path / "full", base="full", least=0.0)
        assert found.agreement.kl < other.agreement.kl


@pytest.mark.parametrize("bits", [4, 16])
def test_chat_streams_what_it_says_in_a_batch(folder_of, family, bits):
    asked = {"text": "What is <image> beside <image>?", "images": [picture(1), picture(2)]}
    talk = MantisChat(folder_of(family), bits=bits)
    assert talk.model.device.type == "cuda"
    whole = talk(**asked, max_new_tokens=8)
    talk.reset()
    assert "".join(talk.stream(**asked, max_new_tokens=8)) == whole == talk.generate([asked], max_new_tokens=8)[0]
