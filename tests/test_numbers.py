"""A step that is no number is not taken, and a run that cannot learn ends."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import chat, logs_of, losses, recipe, write_rows
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from mantis_lite.errors import DivergedError
from mantis_lite.training.checkpoints import newest
from mantis_lite.training.jsonlines import lines_of
from mantis_lite.training.numbers import OVERFLOWS, Numbers
from mantis_lite.training.start import start

STEPS = 6


def run_of(folder, tmp_path, train=None, **more):
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,), id=f"n{i}") for i in range(24)]
    own = {"max_steps": STEPS, "learning_rate": 0.01, "save_steps": 1}
    train = own | ({"samples_per_step": 4} if train is None else train)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    return start(recipe(folder, data=data, run_dir=str(tmp_path / "run"), train=train, **more))


class Spoils(TrainerCallback):
    """Does something to the parameters that train, before some steps."""

    def __init__(self, run, steps, spoil) -> None:
        self.parameters = run.trainer.numbers.parameters
        self.steps, self.spoil = steps, spoil

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 in self.steps:
            self.spoil(self.parameters)


def spoil_gradient(parameters) -> None:
    """Once."""

    def spoiled(gradient):
        handle.remove()
        return gradient * math.nan

    handle = parameters[-1].register_hook(spoiled)


def spoil_weights(parameters) -> None:
    parameters[0].data.fill_(math.inf)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_with_no_number_in_its_gradient_is_not_taken(llava_folder, tmp_path, caplog, max_grad_norm):
    run = run_of(llava_folder, tmp_path, {"max_grad_norm": max_grad_norm})
    before = {}

    class Keeps(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            before[state.global_step + 1] = [p.detach().clone() for p in run.trainer.numbers.parameters]

        def on_step_end(self, args, state, control, **kwargs):
            same = [
                torch.equal(*pair)
                for pair in zip(before[state.global_step], run.trainer.numbers.parameters, strict=True)
            ]
            assert all(same) == (state.global_step == 3)

    run.trainer.add_callback(Spoils(run, [3], spoil_gradient))
    run.trainer.add_callback(Keeps())
    folder = run.train()
    packs = run._packs(3).packs
    names = [run.prepared.train.called(index) for pack in packs for index in pack]
    assert names[0].startswith("rows.jsonl:") and '(id "n' in names[0]
    (line,) = lines_of(tmp_path / "run/skipped.jsonl")
    assert line == {"step": 3, "found": "the gradient is not finite", "samples": names}
    assert f"step 3 is skipped: the gradient is not finite in the pack of {names[0]}" in caplog.text
    assert [math.isfinite(loss) for loss in losses(tmp_path / "run")] == [True, True, False, True, True, True]
    assert all(value.isfinite().all() for value in load_file(folder / "adapter_model.safetensors").values())
    summary = logs_of(tmp_path / "run")[-1]
    assert math.isfinite(summary["train_loss"]), "the sum of losses was lost to one of them"


def test_a_loss_that_is_no_number_names_its_pack(llava_folder, tmp_path):
    """Of the packs of a step, those alone whose loss is none."""
    run = run_of(llava_folder, tmp_path, {"gradient_accumulation_steps": 3}, packing="off")
    wanted = run._packs(2).packs[1]

    class Breaks(nn.Module):
        def __init__(self, inner) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            found = self.inner(*args, **kwargs)
            return found * math.nan if self.calls == 5 else found  # the second pack of the second step

    layer = run.trainer.model.get_submodule("base_model.model.model.language_model")
    layer.norm = Breaks(layer.norm)
    run.train()
    (line,) = lines_of(tmp_path / "run/skipped.jsonl")
    names = [run.prepared.train.called(index) for index in wanted]
    assert line == {"step": 2, "found": "the loss is not finite", "samples": names}


def test_weights_that_are_lost_end_the_run_with_the_last_good_checkpoint(llava_folder, tmp_path):
    run = run_of(llava_folder, tmp_path)
    run.trainer.add_callback(Spoils(run, [4], spoil_weights))
    found = (
        r"step 4: the loss is not finite in the pack of rows.jsonl:\d+ \(id .*; weights are no longer finite\n  Look at"
    )
    with pytest.raises(DivergedError, match=found) as raised:
        run.train()
    assert raised.value.exit_code == 5
    checkpoint, skipped = newest(tmp_path / "run")
    assert checkpoint.name == "checkpoint-3" and not skipped and not (tmp_path / "run/adapter").exists()
    assert all(value.isfinite().all() for value in load_file(checkpoint / "adapter_model.safetensors").values())


def test_only_so_many_steps_are_skipped(llava_folder, tmp_path):
    run = run_of(llava_folder, tmp_path)
    run.trainer.add_callback(Spoils(run, [2, 3, 5, 6], spoil_gradient))
    with pytest.raises(
        DivergedError, match=r"step 6: the gradient is not finite .*; 4 steps were skipped, the most are 3"
    ):
        run.train()
    assert [line["step"] for line in lines_of(tmp_path / "run/skipped.jsonl")] == [2, 3, 5, 6]


def test_what_is_not_finite_is_not_saved(llava_folder, tmp_path):
    run = run_of(llava_folder, tmp_path, {"save_strategy": "no"})
    run.trainer.add_callback(Spoils(run, [STEPS], spoil_weights))
    run.trainer.numbers.on_pre_optimizer_step = lambda *args, **kwargs: None  # as if it had come about behind its back
    with pytest.raises(
        DivergedError, match=r"step 6: weights or the optimiser's state are not finite, and are not saved"
    ):
        run.train()
    assert not (tmp_path / "run/adapter").exists()
    with pytest.raises(DivergedError, match="are not saved"):
        run.trainer.save_now()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def without_gradient(parameters) -> None:
    for parameter in parameters:
        parameter.register_hook(torch.zeros_like)


@pytest.mark.parametrize(("steps", "at", "decay"), [(STEPS, STEPS, 0.0), (30, 10, 0.1)])
def test_a_part_without_gradient_ends_the_run(llava_folder, tmp_path, steps, at, decay):
    """At the end of a short run, and early in a long one; that decay moves it is of no account."""
    trained = {"language_model": "adapter", "projector": "adapter"}
    run = run_of(llava_folder, tmp_path, {"max_steps": steps, "weight_decay": decay}, trainable=trained)
    without_gradient(run.trainer.numbers.parts["projector"])
    with pytest.raises(DivergedError, match=r"projector: should train, and has had no gradient in \d+ steps\n  Look"):
        run.train()
    assert run.trainer.state.global_step in (at, at + 1)  # the first step of a warm-up has a rate of 0
    assert not (tmp_path / "run/adapter").exists()


def test_a_part_that_no_row_has_a_use_for_is_told_of(llava_folder, tmp_path):
    rows = [chat(f"what is number {i}?", f"number {i} is red") for i in range(24)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    trained = {"language_model": "adapter", "projector": "full"}
    train = {"max_steps": 2, "learning_rate": 0.01, "save_strategy": "no", "samples_per_step": 4}
    run = start(recipe(llava_folder, data=data, run_dir=str(tmp_path / "run"), train=train, trainable=trained))
    assert "projector: no row has a picture, so it stays as it is" in run.notices
    run.train()


def numbers(tmp_path, **more) -> tuple[Numbers, SimpleNamespace]:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, math.inf, 0.0])
    found = Numbers(tmp_path, 100, {"language_model": [parameter]}, lambda step: set(), lambda step: [["a.json:1"]])
    state = SimpleNamespace(global_step=0, max_steps=100, log_history=[])
    found.on_train_begin(None, state, None)
    return found, state


def test_a_part_that_does_not_move_ends_the_run(tmp_path):
    found, _ = numbers(tmp_path)
    found.used = lambda step: {"language_model"}
    found.without_gradient.clear()
    with pytest.raises(DivergedError, match=r"has not moved in 0 steps, which are too small\n  Raise train.learning_r"):
        found.require_moved(7)
    found.parameters[0].data += 1e-3
    found.require_moved(7)


def test_overflows_of_float16_are_left_to_the_loss_scale_for_a_while(tmp_path):
    found, state = numbers(tmp_path)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}], scaler=object(), optimizer=None)
    for _ in range(OVERFLOWS):
        found.counted(torch.tensor(2.0))
        found.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
    assert len(found.skipped) == 0 and found.parameters[0].grad is not None  # GradScaler has to see it
    found.counted(torch.tensor(2.0))
    found.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
    assert len(found.skipped) == 1


def test_a_spike_is_warned_of(tmp_path, caplog):
    found, state = numbers(tmp_path)
    caplog.set_level(logging.WARNING)
    told = []
    for loss in (4.0, 3.0, 5.0, 20.0, 4.0):
        logs = {"loss": loss}
        found.on_log(None, state, None, logs)
        told.append("spike" in logs)
    assert told == [False, False, False, True, False]
    assert caplog.text.count("is a spike, 3 times its mean") == 1
