"""Held-out rows while a run trains: their loss, answers to a few, the best checkpoint, and when it is enough."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from clips_made import make
from helpers import chat, logs_of, losses, picture, write_rows
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from mantis_lite.errors import RecipeError, SampleError
from mantis_lite.generate import answer
from mantis_lite.models import lm_head
from mantis_lite.recipe_file import make_recipe
from mantis_lite.training.checkpoints import newest, saved, step_of
from mantis_lite.training.held_out import FEW, asked_of
from mantis_lite.training.start import start


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows of which those held out say otherwise, so that what is learnt of the one is soon no good for the other."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i % 3,)) for i in range(12)]
    other = [chat(f"what is number {i}?", "I will not say that", images=(i % 3,)) for i in range(3)]
    other.append(chat("One?", "a circle", "Two?", "a red square", id="two"))
    return write_rows(folder / "rows.jsonl", rows), write_rows(folder / "held_out.jsonl", other)


def settings_of(llava_folder, files, run_dir: Path, steps: int = 12, lr: float = 0.02, **asked) -> dict:
    rows, held_out = files
    return {
        "model": str(llava_folder),
        "data": {"sources": rows, "eval": held_out},
        "method": "lora",
        "memory": {"kernels": "off"},
        "packing": {"max_length": 256},
        "run_dir": str(run_dir),
        "eval": {"every": 1, "generate": 0} | asked,
        "train": {
            "max_steps": steps,
            "learning_rate": lr,
            "gradient_accumulation_steps": 1,
            "lr_scheduler_type": "constant",
        },
    }


def answers_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "generations.jsonl").read_text().splitlines()]


def evaluations(run_dir: Path) -> dict[int, float]:
    return {log["step"]: log["eval_loss"] for log in logs_of(run_dir) if "eval_loss" in log}


def test_answers_are_written_and_change_nothing(llava_folder, files, tmp_path):
    straight = start(make_recipe(settings_of(llava_folder, files, tmp_path / "straight", 3, every=2))).train()
    run = start(make_recipe(settings_of(llava_folder, files, tmp_path / "run", 3, every=2, generate=9)))
    folder = run.train()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    one, other = (load_file(path / "adapter_model.safetensors") for path in (straight, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    said = answers_of(tmp_path / "run")
    rows = [f"held_out.jsonl:{at}" for at in range(1, 5)]
    assert [(line["step"], line["where"]) for line in said] == [(step, row) for step in (0, 2, 3) for row in rows]
    assert said[0]["expected"] == "I will not say that" and said[0]["prompt"] == "<image>what is number 0?"
    assert (said[3]["prompt"], said[3]["expected"], said[3]["id"]) == ("One?\na circle\nTwo?", "a red square", "two")


def test_answers_are_those_of_the_model_then(llava_folder, files, tmp_path):
    run = start(make_recipe(settings_of(llava_folder, files, tmp_path / "run", 2, every=2, generate=1)))
    run.train()
    before, line = answers_of(tmp_path / "run")
    assert (before["step"], line["step"]) == (0, 2)
    sample = run.prepared.held_out[0]
    asked = type(sample)(sample.where, sample.id, sample.turns[:1])
    assert line["answer"] == answer(run.trainer.model, run.encoder, asked, 128)


def test_a_few_rows_are_answered_where_the_recipe_does_not_say_how_many(llava_folder, files, tmp_path):
    run = start(make_recipe(settings_of(llava_folder, files, tmp_path / "run", 1, generate=None)))
    assert [sample.where for sample in run.answered] == [f"held_out.jsonl:{at}" for at in range(1, FEW + 1)]
    settings = settings_of(llava_folder, files, tmp_path / "other", 1, generate=None)
    assert start(make_recipe(settings | {"memory": {"vision_cache": "memory"}})).answered == []


def test_a_base_in_16_bits_answers_with_what_trains_in_float32(llava_folder, files, tmp_path):
    """As on a GPU: what trains beside the frozen weights is in another format."""
    settings = settings_of(llava_folder, files, tmp_path / "run", 1, generate=1)
    settings["train"]["bf16"] = True
    run = start(make_recipe(settings | {"trainable": {"projector": "full"}}))
    for parameter in run.trainer.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    run.train()
    assert [line["step"] for line in answers_of(tmp_path / "run")] == [0, 1]


def test_clips_are_answered_too(llava_folder, tmp_path):
    make(tmp_path / "clip.mp4", frames=20)
    rows = [chat(f"<video>what is number {i}?", "red") | {"video": "clip.mp4"} for i in range(4)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = settings_of(llava_folder, (data, 0.3), tmp_path / "run", 1, generate=1)
    start(make_recipe(settings | {"task": "video", "media": {"num_frames": 2}})).train()
    _, line = answers_of(tmp_path / "run")
    assert line["expected"] == "red" and line["prompt"].count("<image>") in (0, 1)


def test_no_positions_left_for_an_answer_is_said_before_training(llava_folder, files, tmp_path):
    run = start(make_recipe(settings_of(llava_folder, files, tmp_path / "run", 1)))
    run.trainer.model.config.get_text_config().max_position_embeddings = 130
    asking = run.prepared.held_out, run.trainer.model, run.encoder
    with pytest.raises(SampleError, match="and up to 128 for the answer, where the model has 130 positions"):
        asked_of(make_recipe(settings_of(llava_folder, files, tmp_path / "run", 1, generate=1)), *asking)
    # Where no number was asked for, those that have room are answered.
    assert asked_of(make_recipe(settings_of(llava_folder, files, tmp_path / "run", 1, generate=None)), *asking) == []


def test_a_run_ends_when_it_gets_no_better(llava_folder, files, tmp_path, caplog):
    run = start(make_recipe(settings_of(llava_folder, files, tmp_path / "run", 40, metric="loss", patience=2)))
    folder = run.train()
    found = evaluations(tmp_path / "run")
    best = min(found, key=found.get)
    last = max(found)
    assert (
        last == best + 2 < 40
        and f"step {last} ends the run: eval_loss has not been better since step {best}" in caplog.text
    )
    kept = {step_of(path) for path in saved(tmp_path / "run")}
    assert {best, last} <= kept
    assert json.loads((folder / "mantis_lite.json").read_text())["metrics"]["eval_loss"] == found[best]
    weights, wanted = (
        load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / f"run/checkpoint-{best}")
    )
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in weights)
    shutil.rmtree(folder)  # as when it is killed before it has saved
    again = start(make_recipe(settings_of(llava_folder, files, tmp_path / "run", 40, metric="loss", patience=2)))
    assert again.train() == folder and evaluations(tmp_path / "run") == found, "what has ended takes no more steps"
    assert all(
        torch.equal(value, weights[name]) for name, value in load_file(folder / "adapter_model.safetensors").items()
    )


def test_patience_counts_on_after_a_stop(llava_folder, files, tmp_path):
    """A run that was stopped where it was no better any more ends where it would have."""
    asked = {"metric": "loss", "patience": 3}
    start(make_recipe(settings_of(llava_folder, files, tmp_path / "straight", 40, **asked))).train()
    wanted = evaluations(tmp_path / "straight")
    settings = settings_of(llava_folder, files, tmp_path / "run", 40, **asked)
    run = start(make_recipe(settings))
    run.trainer.args.max_steps = max(wanted) - 1
    run.trainer.args.save_steps = 1

    class Cut(Exception):
        pass

    def cut(*args, **kwargs):
        raise Cut

    run.trainer._finalize_training = cut
    with pytest.raises(Cut):
        run.train()
    assert step_of(newest(tmp_path / "run")[0]) == max(wanted) - 1
    start(make_recipe(settings)).train()
    assert evaluations(tmp_path / "run") == wanted


class Widest(TorchDispatchMode):
    """Notes the most rows of any tensor as wide as a vocabulary, whoever makes it, but for views of the head."""

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.words, self.own, self.rows = len(head), head.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.shape[-1:] == (self.words,):
            if made.untyped_storage().data_ptr() != self.own:
                self.rows = max(self.rows, made.numel() // self.words)
        return made


@pytest.mark.parametrize("tile", [8, 4_096])
def test_a_held_out_loss_holds_a_tile_of_logits(llava_folder, files, tmp_path, monkeypatch, tile):
    """Of tokens with loss, and not those of a whole pack, unless there are as few as that."""
    monkeypatch.setattr(lm_head, "CPU_TILE", tile)
    run = start(make_recipe(settings_of(llava_folder, files, tmp_path / "run", 1)))
    with Widest(run.trainer.model.get_output_embeddings().weight) as widest:
        run.trainer.evaluate()
    most = max(int((pack["labels"] != -100).sum()) for pack in run.trainer.get_eval_dataloader())
    assert widest.rows == min(tile, most) and most > 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eval": {"metric": "loss"}}, "eval.metric: nothing is evaluated while it trains\n  Set eval.every"),
        ({"eval": {"generate": 2}}, "eval.generate: nothing is evaluated while it trains"),
        (
            {"eval": {"every": 1, "metric": "accuracy"}},
            "eval.metric: accuracy is not among what is evaluated\n  Set one of loss.",
        ),
        ({"eval": {"every": 1, "patience": 2}}, "eval.patience: has no effect without a metric"),
        (
            {"eval": {"every": 1, "metric": "loss"}, "train": {"greater_is_better": True}},
            "train.greater_is_better: has no effect beside eval.metric",
        ),
        (
            {"eval": {"every": 2, "metric": "loss"}, "train": {"save_steps": 3}},
            "train.save_steps: 3, but eval.metric takes a multiple of eval.every\n  Set it to 2.",
        ),
        (
            {"eval": {"every": 2, "metric": "loss"}, "train": {"save_strategy": "epoch"}},
            "train.save_strategy: epoch, but eval.metric goes back to what is saved by steps",
        ),
        (
            {"eval": {"every": 1, "metric": "f1"}, "task": "classify", "head": {"problem": "regression"}},
            "eval.metric: f1 is not among what is evaluated\n  Set one of loss, mse, mae, spearman, pearson.",
        ),
        ({"data": 5, "eval": {"data": "held.json"}}, "data: expected its own keys"),
        (
            {"eval": {"every": 1, "generate": 1}, "memory": {"vision_cache": "disk"}},
            "eval.generate: 1, but memory.vision_cache keeps what pictures come to",
        ),
        (
            {"eval": {"every": 1, "generate": 1}, "launch": {"strategy": "zero3", "gpus": 2}, "method": "full"},
            "eval.generate: 1, but each GPU has a part of the weights",
        ),
        (
            {"eval": {"every": 1, "generate": 1}, "task": "classify", "head": {"problem": "regression"}},
            "eval.generate: 1, but task=classify answers nothing",
        ),
        (
            {"eval": {"every": 1, "data": "other.json"}},
            "eval.data: other.json, and data.eval: held.json in recipe\n  Keep one",
        ),
    ],
)
def test_what_has_no_effect_is_refused(change, said):
    settings = {
        "model": "tiny",
        "data": {"sources": "rows.json", "eval": "held.json"},
        "run_dir": "x",
        "method": "lora",
    }
    with pytest.raises(RecipeError) as raised:
        make_recipe(settings | change)
    assert said in str(raised.value)


def test_held_out_rows_have_two_names_and_one_home():
    base = {"model": "tiny", "data": "rows.json", "run_dir": "x", "method": "lora"}
    made = make_recipe(base | {"eval": {"data": "held.json", "every": 5}})
    assert made == make_recipe(base, ["eval.data=held.json", "eval.every=5"])
    assert made == make_recipe(base, ["data.eval=held.json", "eval.every=5"])
    assert made.data.eval == "held.json" and make_recipe(base, ["eval.data=0.1"]).data.eval == 0.1


def test_a_scores_metric_may_be_the_best(llava_folder, tmp_path):
    rows = [{"images": [{"bytes": picture(at)}], "prompt": "How red?", "label": float(at % 3)} for at in range(12)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = settings_of(llava_folder, (data, 0.3), tmp_path / "run", 3, metric="spearman")
    run = start(make_recipe(settings | {"task": "classify", "head": {"problem": "regression"}}))
    assert run.trainer.args.metric_for_best_model == "eval_spearman" and run.trainer.args.greater_is_better
    run.train()
    found = {
        log["step"]: log["eval_spearman"] for log in logs_of(tmp_path / "run") if "eval_spearman" in log and log["step"]
    }
    best = max(found, key=found.get)
    assert (run.trainer.state.best_global_step, run.trainer.state.best_metric) == (best, found[best])


@pytest.mark.parametrize("broken", [False, True], ids=["labels that never change", "scores that are no numbers"])
def test_a_metric_that_is_not_defined_is_no_better(llava_folder, tmp_path, caplog, broken):
    rows = [{"images": [{"bytes": picture(at)}], "prompt": "How red?", "label": float(at % 3)} for at in range(6)]
    held_out = rows[:3] if broken else [row | {"label": 1.0} for row in rows[:3]]
    data = write_rows(tmp_path / "rows.jsonl", rows), write_rows(tmp_path / "held_out.jsonl", held_out)
    settings = settings_of(llava_folder, data, tmp_path / "run", 1, metric="spearman", patience=1)
    run = start(make_recipe(settings | {"task": "classify", "head": {"problem": "regression"}}))
    if broken:
        predict = run.trainer.prediction_step

        def not_finite(*args, **kwargs):
            loss, scores, targets = predict(*args, **kwargs)
            return loss, scores * math.nan, targets

        run.trainer.prediction_step = not_finite
    run.train()
    assert "eval_spearman is not defined in step 1, and counts as no better" in caplog.text
    assert run.trainer.state.best_global_step is None


@pytest.mark.slow
def test_of_two_processes_the_first_answers(forks, llava_folder, files, tmp_path):
    """And both end where one alone would, with the same answers."""
    asked = {"metric": "loss", "patience": 2, "generate": 2}
    two = {"gpus": 2, "strategy": "ddp"}
    for name, launch, ranks in [("one", {}, None), ("two", two, 2)]:
        settings = settings_of(llava_folder, files, tmp_path / name, 40, **asked)
        settings["train"]["gradient_accumulation_steps"] = 2
        settings["packing"] = {"max_length": 160, "balance": 2}
        done = forks(settings | {"launch": launch}, ranks=ranks)
        assert done["status"] == 0, done["said"]
    one, other = (evaluations(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == other.keys() and max(one) < 40 and one == pytest.approx(other, rel=1e-5)
    assert answers_of(tmp_path / "one") == answers_of(tmp_path / "two")
