"""Learning rates of parts: a part's own, the schedule that all share, and what goes on with them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import chat, logs_of, losses, recipe, train, write_rows
from safetensors.torch import load_file
from test_resume import curve_of, weights_of
from test_train import StopAt
from torch import nn
from typer.testing import CliRunner

from benchmarks.forks import Forks
from mantis_lite.cli import app
from mantis_lite.errors import RecipeError, ResumeError
from mantis_lite.training.rates import group_by_part
from mantis_lite.training.start import start

ALL = ("language_model", "projector", "vision_tower")
PLAIN = {"learning_rate": 0.01, "max_grad_norm": 0, "samples_per_step": 4, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    found = [chat(f"what is number {i}?", f"number {i} is red", images=(i,), id=f"n{i}") for i in range(12)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", found)


def asked(folder: Path, rows: str, run_dir: Path, rates: dict | None = None, steps: int = 1, **more):
    """A run that trains every part, in plain steps of gradients times rates."""
    settings = {
        "data": rows,
        "method": "full",
        "run_dir": str(run_dir),
        "packing": {"max_length": 256},
        "trainable": dict.fromkeys(ALL, "full") | ({"lr": rates} if rates else {}),
        "memory": {"optimizer": "sgd"},
        "train": PLAIN | {"max_steps": steps, "save_strategy": "no"},
    }
    return recipe(folder, **(settings | more))


def moved(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """How far each tensor went."""
    before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    return {name: after[name].double() - before[name].double() for name in after}


def test_a_part_goes_as_far_as_its_rate_says(llava_folder, rows, tmp_path):
    rates = {"projector": 1.0, "vision_tower": 0.0625}
    steps = {"train": PLAIN | {"learning_rate": 0.25, "max_steps": 1, "save_strategy": "no"}}
    plain = moved(llava_folder, train(asked(llava_folder, rows, tmp_path / "plain", **steps)))
    own = moved(llava_folder, train(asked(llava_folder, rows, tmp_path / "own", rates, **steps)))
    farthest = dict.fromkeys(ALL, 0.0)
    for name, step in plain.items():
        part = next((part for part in ("projector", "vision_tower") if part in name), "language_model")
        share = rates.get(part, 0.25) / 0.25
        torch.testing.assert_close(own[name], share * step, rtol=1e-3, atol=1e-6, msg=lambda text, of=name: of + text)
        farthest[part] = max(farthest[part], float(step.abs().max()))
    assert all(far > 1e-4 for far in farthest.values()), farthest


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor"])
def test_the_same_rate_written_out_for_each_part_changes_nothing(llava_folder, rows, tmp_path, optimizer):
    of = {"memory": {"optimizer": optimizer}}
    plain = train(asked(llava_folder, rows, tmp_path / "plain", steps=3, **of))
    own = train(asked(llava_folder, rows, tmp_path / "own", dict.fromkeys(ALL, 0.01), steps=3, **of))
    assert losses(tmp_path / "own") == losses(tmp_path / "plain")
    assert weights_of(own.parent) == weights_of(plain.parent)


def test_parts_share_the_schedule_and_are_logged(llava_folder, rows, tmp_path):
    steps = {"max_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "cosine"}
    run_dir = tmp_path / "run"
    train(asked(llava_folder, rows, run_dir, {"projector": 0.04}, train=PLAIN | steps | {"save_strategy": "no"}))
    logs = [log for log in logs_of(run_dir) if "loss" in log]
    assert [log["learning_rate_projector"] for log in logs] == pytest.approx([4 * log["learning_rate"] for log in logs])
    assert [log["learning_rate"] for log in logs][:3] == pytest.approx([0, 0.005, 0.01])
    assert not any(key.startswith("learning_rate_") for log in logs for key in log if not key.endswith("projector"))
    page = (run_dir / "report.html").read_text()
    assert "learning rate" in page and ">projector<" in page


def test_where_every_part_has_its_own_the_log_names_one_for_all(llava_folder, rows, tmp_path):
    own = dict(zip(ALL, (0.02, 0.03, 0.04), strict=True))
    train(asked(llava_folder, rows, tmp_path / "run", own))
    (log,) = [log for log in logs_of(tmp_path / "run") if "loss" in log]
    assert {part: log[f"learning_rate_{part}"] for part in ALL} == own
    assert log["learning_rate"] == own["language_model"]
    page = (tmp_path / "run/report.html").read_text()
    assert all(f">{part.replace('_', ' ')}<" in page for part in ALL)


def test_a_score_head_has_a_rate(llava_folder, tmp_path):
    scored = [{"images": [], "prompt": f"number {i}", "labels": {"good": i % 3}} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(scored))
    heads, others = [], []
    for rate in (None, 0.02, 0.03):
        settings = {
            "data": str(tmp_path / "rows.json"),
            "run_dir": str(tmp_path / f"{rate}"),
            "task": "classify",
            "method": "lora",
            "head": {"problem": "regression"},
            "memory": {"optimizer": "sgd"},
            "trainable": {"lr": {"head": rate}},
            "train": PLAIN | {"samples_per_step": 8, "max_steps": 1, "save_strategy": "no"},
        }
        found = load_file(train(recipe(llava_folder, **settings)) / "adapter_model.safetensors")
        heads.append(found.pop("base_model.model.score.weight"))
        found.pop("base_model.model.score.bias")
        others.append(found)
    assert (heads[1] - heads[0]).any()
    torch.testing.assert_close(heads[2] - heads[1], heads[1] - heads[0], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(value, other[name]) for other in others for name, value in others[0].items())
    (log,) = [log for log in logs_of(tmp_path / "0.03") if "loss" in log]
    assert (log["learning_rate"], log["learning_rate_head"]) == (0.01, 0.03)


@pytest.mark.slow
def test_a_run_goes_on_at_its_rates_or_at_others(llava_folder, rows, tmp_path):
    settings = {
        "model": str(llava_folder),
        "data": rows,
        "method": "full",
        "packing": {"max_length": 256},
        "trainable": {"lr": {"projector": 0.004}},
        "train": {"learning_rate": 0.01, "samples_per_step": 4, "num_train_epochs": 2, "save_steps": 1, "seed": 3},
    }
    others = settings | {"trainable": {"lr": {"language_model": 0.001}}}
    with Forks() as forks:
        assert forks(settings | {"run_dir": str(tmp_path / "straight")})["status"] == 0
        own = {"run_dir": str(tmp_path / "run")}
        assert forks(settings | own, kill_at=2)["status"] == -9
        shutil.copytree(tmp_path / "run", tmp_path / "other")
        assert forks(settings | own)["status"] == 0
        own = {"run_dir": str(tmp_path / "other")}
        refused = forks(others | own)
        assert refused["status"] == 7
        assert "another trainable.lr.language_model: null before, 0.001 now" in refused["said"]
        accepted = forks(others | own, options={"accept_changes": True})
        assert accepted["status"] == 0, accepted["said"]
    assert curve_of(tmp_path / "run") == curve_of(tmp_path / "straight")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "straight")
    logs = [log for log in logs_of(tmp_path / "other") if "loss" in log]
    assert all(log["learning_rate_projector"] <= 0.004 for log in logs[:2])
    assert all("learning_rate_projector" not in log for log in logs[2:])
    for log, before in zip(logs[2:], logs_of(tmp_path / "straight")[2:], strict=False):
        assert log["learning_rate"] == pytest.approx(before["learning_rate"])
        assert log["learning_rate_language_model"] == pytest.approx(before["learning_rate"] / 10)


def test_an_adapter_that_is_gone_on_with_says_what_has_a_rate(llava_folder, rows, tmp_path):
    short = {"method": "lora", "memory": {}}
    first = train(asked(llava_folder, rows, tmp_path / "first", **short, trainable={}))
    model = {"name": str(llava_folder), "adapter": str(first)}
    with pytest.raises(
        RecipeError, match=r"trainable.lr.projector: model.adapter trains language_model\n  Leave it out."
    ):
        start(asked(model, rows, tmp_path / "run", **short, trainable={"lr": {"projector": 0.1}}))
    train(asked(model, rows, tmp_path / "run", **short, trainable={"lr": {"language_model": 0.03}}))
    (log,) = [log for log in logs_of(tmp_path / "run") if "loss" in log]
    assert log["learning_rate_language_model"] == 0.03


def test_a_checkpoint_with_other_groups_is_refused(llava_folder, rows, tmp_path, monkeypatch):
    settings = {"method": "full", "train": PLAIN | {"num_train_epochs": 1, "save_steps": 1}, "trainable": {}}
    run = start(asked(llava_folder, rows, tmp_path / "run", **settings))
    with monkeypatch.context() as before:  # as a version did that had no groups of parts
        before.setattr("mantis_lite.training.trainers.group_by_part", lambda *_: None)
        run.trainer.add_callback(StopAt(1))
        run.walk()
        run.lock.release()
    with pytest.raises(ResumeError, match="another version of this package: loaded state dict has a different number"):
        start(asked(llava_folder, rows, tmp_path / "run", **settings)).train()


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_groups_keep_what_else_they_have(kind):
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": [layer.weight, other.weight], "weight_decay": 0.3}, {"params": [layer.bias, other.bias]}]
    optimizer = torch.optim.AdamW(groups, lr=kind(0.1), weight_decay=0, foreach=False)
    group_by_part(optimizer, {"b": list(layer.parameters()), "a": list(other.parameters())}, {"a": 0.5})
    found = [
        (g["part"], round(float(g["lr"]), 6), g["weight_decay"], [id(p) for p in g["params"]])
        for g in optimizer.param_groups
    ]
    assert found == [
        ("a", 0.5, 0.3, [id(other.weight)]),
        ("b", 0.1, 0.3, [id(layer.weight)]),
        ("a", 0.5, 0, [id(other.bias)]),
        ("b", 0.1, 0, [id(layer.bias)]),
    ]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert {type(rate) for rate in rates} == {type(kind(0.1))} and len({id(rate) for rate in rates[:2]}) == 2


def test_a_rate_is_given_on_the_command_line(llava_folder, rows, tmp_path):
    words = [f"model={llava_folder}", f"data={rows}", f"run_dir={tmp_path / 'run'}", "train.max_steps=1"]
    words += ["launch.strategy=single", "train.warmup_steps=0"]
    done = CliRunner().invoke(app, ["train", "chat-siglip-llama3-full", *words, "trainable.lr.projector=2e-5"])
    assert done.exit_code == 0, done.output
    (log,) = [log for log in logs_of(tmp_path / "run") if "loss" in log]
    assert log["learning_rate_projector"] == pytest.approx(2 * log["learning_rate"])
