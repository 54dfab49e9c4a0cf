"""A run that is killed goes on as if it had not been, or says why it cannot."""

import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from clips_made import make
from helpers import BY_CLOCK, chat, logs_of, picture, write_rows
from safetensors.torch import load_file

from benchmarks.forks import Forks
from mantis_lite.data.content import content_of
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.schema import parse
from mantis_lite.errors import DiskError
from mantis_lite.recipe_file import make_recipe
from mantis_lite.training.checkpoints import saved, step_of
from mantis_lite.training.jsonlines import JsonLines, lines_of
from mantis_lite.training.start import start

STEPS = 5


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


def settings_of(folder, data, **more):
    return {
        "model": str(folder),
        "data": data,
        "method": "lora",
        "memory": {"kernels": "off"},
        "packing": {"max_length": 256},
        "lora": {"dropout": 0.2},
        "train": {"learning_rate": 0.02, "samples_per_step": 4, "save_steps": 1, "save_total_limit": 2, "seed": 3},
    } | more


def curve_of(run_dir: Path) -> list[tuple]:
    """Everything that was logged of each step, but for what it took of time."""
    return [
        tuple((key, value) for key, value in log.items() if not key.endswith(BY_CLOCK))
        for log in logs_of(run_dir)
        if "loss" in log or "eval_loss" in log
    ]


def weights_of(run_dir: Path) -> str:
    (file,) = [*run_dir.glob("adapter/*.safetensors"), *run_dir.glob("model/*.safetensors")]
    return hashlib.sha256(file.read_bytes()).hexdigest()


def trained(forks, settings, run_dir, **job) -> dict:
    return forks(settings | {"run_dir": str(run_dir)}, **job)


def chat_rows(folder: Path) -> str:
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,), id=f"n{i}") for i in range(16)]
    return write_rows(folder / "rows.jsonl", rows)


def of_task(task: str, folder, tmp_path: Path) -> dict:
    """A short run of a task: two epochs, so that it is stopped within one and at its end."""
    if task in ("chat", "full"):
        more = {"method": "full", "lora": {}} if task == "full" else {}
        return settings_of(folder, {"sources": chat_rows(tmp_path), "eval": 0.2}, eval={"every": 2}, **more)
    if task == "video":
        clip = make(tmp_path / "clip.mp4", frames=12)
        rows = [{"video": clip.name, "messages": chat(f"<video> {i}?", f"it is {i}")["messages"]} for i in range(10)]
        more = {"task": "video", "media": {"num_frames": 2}}
    else:
        rows = [
            {"images": [], "prompt": f"How good is number {i}?", "labels": {"good": i % 3, "fast": i / 7}}
            for i in range(40)
        ]
        more = {"task": "classify", "head": {"problem": "regression"}}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return settings_of(folder, str(tmp_path / "rows.json"), **more)


EVERY = [(task, workers) for task in ("chat", "full", "video", "classify") for workers in (0, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "workers"), EVERY)
def test_a_run_killed_at_every_step_is_the_run_that_was_not(forks, llava_folder, tmp_path, task, workers):
    settings = of_task(task, llava_folder, tmp_path)
    settings["train"] |= {"num_train_epochs": 2, "samples_per_step": 4, "dataloader_num_workers": workers}
    straight = trained(forks, settings, tmp_path / "straight")
    assert straight["status"] == 0, straight["said"]
    steps = max(log["step"] for log in logs_of(tmp_path / "straight"))
    assert steps >= 4
    for step in range(1, steps + 1):
        # Once a step has been saved or, every other time, not yet: that one is taken twice.
        for once_saved in [True] if step % 2 else [False, True]:
            killed = trained(forks, settings, tmp_path / "killed", kill_at=step, saved=once_saved)
            assert killed["status"] == -signal.SIGKILL, killed["said"]
    resumed = trained(forks, settings, tmp_path / "killed")
    assert resumed["status"] == 0, resumed["said"]
    assert f"goes on from checkpoint-{steps}" in resumed["said"]
    assert curve_of(tmp_path / "killed") == curve_of(tmp_path / "straight")
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "straight")


@pytest.fixture(scope="module")
def settings(llava_folder, tmp_path_factory):
    return settings_of(llava_folder, chat_rows(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def straight(forks, settings, tmp_path_factory):
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = trained(forks, settings, run_dir)
    assert done["status"] == 0, done["said"]
    return run_dir, done["seconds"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sixty_kills_at_random_moments_lose_nothing(forks, settings, straight, tmp_path):
    run_dir, seconds = straight
    drawn = np.random.default_rng(0).uniform(0.05, 0.95, 400)
    kills = runs = 0
    for share in drawn:
        done = trained(forks, settings, tmp_path / f"run-{runs}", kill_after=share * seconds)
        assert done["status"] in (0, -signal.SIGKILL), done["said"]
        kills += done["status"] != 0
        if done["status"] == 0 or (tmp_path / f"run-{runs}/adapter").exists():  # or killed while it drew its curve
            assert weights_of(tmp_path / f"run-{runs}") == weights_of(run_dir)
            assert curve_of(tmp_path / f"run-{runs}") == curve_of(run_dir)
            assert not list((tmp_path / f"run-{runs}").glob("checkpoint-*.tmp-*")) or done["status"] != 0
            runs += 1
        if kills >= 60 and runs > 5:  # a machine that has slowed down kills runs more often before they end
            break
    assert kills >= 60 and runs > 5


OTHERS = [pytest.param(number, marks=pytest.mark.slow) for number in ("SIGUSR1", "SIGUSR2", "SIGHUP")]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", *OTHERS])
def test_a_signal_has_the_step_finished_and_saved(forks, settings, straight, tmp_path, number):
    code = getattr(signal, number)
    more = {"train": settings["train"] | {"save_steps": 100}}
    stopped = trained(forks, settings | more, tmp_path / "run", signals=[(2, code)])
    assert stopped["status"] == 128 + code, stopped["said"]
    assert f"Stopped: stopped by {number}: saved {tmp_path}/run/checkpoint-2; run the same command" in stopped["said"]
    resumed = trained(forks, settings | more, tmp_path / "run")
    assert resumed["status"] == 0 and "goes on from checkpoint-2" in resumed["said"], resumed["said"]
    assert curve_of(tmp_path / "run") == curve_of(straight[0])
    assert weights_of(tmp_path / "run") == weights_of(straight[0])


@pytest.mark.parametrize("first", [[], [(2, signal.SIGTERM)]])
def test_a_second_interrupt_ends_at_once(forks, settings, tmp_path, first):
    signals = [*first, (2, signal.SIGINT), (2, signal.SIGINT)]
    stopped = trained(forks, settings, tmp_path / "run", signals=signals)
    assert stopped["status"] == -signal.SIGINT
    assert "SIGINT: finishing the step and saving; Ctrl-C again ends at once" in stopped["said"]
    assert trained(forks, settings, tmp_path / "run")["status"] == 0


def test_a_signal_in_an_evaluation_saves_at_once_and_owes_it(forks, settings, tmp_path):
    data = {"sources": settings["data"], "eval": 0.2}
    more = {"data": data, "eval": {"every": 2}, "train": settings["train"] | {"save_steps": 100}}
    assert trained(forks, settings | more, tmp_path / "straight")["status"] == 0
    stopped = trained(forks, settings | more, tmp_path / "run", signal_in_evaluation=(2, signal.SIGTERM))
    assert stopped["status"] == 143 and "saved " in stopped["said"] and "checkpoint-2" in stopped["said"]
    assert [log["step"] for log in logs_of(tmp_path / "run") if "eval_loss" in log] == [0]
    assert trained(forks, settings | more, tmp_path / "run")["status"] == 0
    assert curve_of(tmp_path / "run") == curve_of(tmp_path / "straight")


def test_a_signal_in_the_evaluation_before_the_first_step_leaves_nothing(forks, settings, tmp_path):
    more = {"data": {"sources": settings["data"], "eval": 0.2}}
    stopped = trained(forks, settings | more, tmp_path / "run", signal_in_evaluation=(0, signal.SIGTERM))
    assert stopped["status"] == 143 and "stopped by SIGTERM: before the first step" in stopped["said"]
    assert not saved(tmp_path / "run") and not (tmp_path / "run/metrics.jsonl").exists()
    assert trained(forks, settings | more, tmp_path / "run")["status"] == 0


def test_a_damaged_checkpoint_is_skipped_for_an_older_one(forks, settings, straight, tmp_path):
    assert trained(forks, settings, tmp_path / "run", kill_at=3)["status"] == -9
    damaged = tmp_path / "run/checkpoint-3/optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    resumed = trained(forks, settings, tmp_path / "run")
    assert resumed["status"] == 0, resumed["said"]
    assert "notice: checkpoint-3 is skipped: optimizer.pt is not as it was written" in resumed["said"]
    assert "notice: goes on from checkpoint-2" in resumed["said"]
    assert weights_of(tmp_path / "run") == weights_of(straight[0])


def test_a_run_never_begins_anew_by_itself(forks, settings, tmp_path):
    assert trained(forks, settings, tmp_path / "run", kill_at=2)["status"] == -9
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    refused = trained(forks, settings, tmp_path / "run")
    assert refused["status"] == 7, refused["said"]
    found = (
        "has no checkpoint that is whole; checkpoint-2 is skipped: there is no manifest.json; checkpoint-1 is skipped"
    )
    assert found in refused["said"] and "add --from-scratch to move the run aside and begin anew" in refused["said"]
    anew = trained(forks, settings, tmp_path / "run", options={"from_scratch": True})
    assert anew["status"] == 0 and (tmp_path / "run.1/checkpoint-2/optimizer.pt").is_file()
    again = trained(forks, settings, tmp_path / "run")
    assert again["status"] == 7 and "holds a finished run" in again["said"]


def test_a_start_that_saved_nothing_is_told_of(forks, settings, tmp_path):
    assert trained(forks, settings, tmp_path / "run", kill_at=1, saved=False)["status"] == -9
    again = trained(forks, settings, tmp_path / "run")
    assert again["status"] == 0
    assert "notice: an earlier start in this folder had saved no checkpoint: begins at step 0" in again["said"]


@pytest.fixture
def begun(forks, settings, tmp_path):
    """The settings of a run that was killed after its second step, on rows of its own."""
    own = settings | {"data": chat_rows(tmp_path), "run_dir": str(tmp_path / "run")}
    assert forks(own, kill_at=2)["status"] == -9
    return own


def test_another_recipe_is_refused_with_the_difference_or_accepted(forks, begun):
    now = begun | {"train": begun["train"] | {"learning_rate": 0.001}, "packing": {"max_length": 200}}
    refused = forks(now)
    assert refused["status"] == 7, refused["said"]
    assert (
        "another packing.max_length: 256 before, 200 now\n  another train.learning_rate: 0.02 before, 0.001 now"
        in (refused["said"])
    )
    accepted = forks(now, options={"accept_changes": True})
    assert accepted["status"] == 0, accepted["said"]
    assert "notice: accepted: another train.learning_rate: 0.02 before, 0.001 now" in accepted["said"]
    rates = [log["learning_rate"] for log in logs_of(Path(begun["run_dir"])) if "loss" in log]
    assert max(rates[:2]) > 0.001 >= max(rates[2:]) > 0
    assert forks(now)["status"] == 7  # finished


def test_what_makes_no_difference_may_be_another(forks, begun, straight):
    """And holds from then on: the checkpoint's own is not gone by."""
    done = forks(begun | {"train": begun["train"] | {"save_steps": 100, "save_total_limit": 9}})
    assert done["status"] == 0, done["said"]
    assert "notice: accepted: another train.save_steps: 1 before, 100 now" in done["said"]
    run_dir = Path(begun["run_dir"])
    steps = max(log["step"] for log in logs_of(run_dir))
    assert [step_of(path) for path in saved(run_dir)] == [steps, 2, 1]
    assert weights_of(run_dir) == weights_of(straight[0])


def test_rates_that_go_by_how_the_run_went_cannot_be_changed(forks, settings, tmp_path):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_loss"}
    data = {"sources": chat_rows(tmp_path), "eval": 0.2}
    own = settings | {"data": data, "eval": {"every": 1}, "train": settings["train"] | plateau}
    assert trained(forks, own, tmp_path / "run", kill_at=2)["status"] == -9
    other = own | {"train": own["train"] | {"learning_rate": 0.001}}
    refused = trained(forks, other, tmp_path / "run", options={"accept_changes": True})
    assert refused["status"] == 7 and "reduce_lr_on_plateau sets its rates by how the run went" in refused["said"]


@pytest.mark.parametrize("file", ["recipe.yaml", "labels.json"])
def test_a_run_without_its_own_files_is_refused(forks, llava_folder, tmp_path, file):
    settings = of_task("classify", llava_folder, tmp_path)
    assert trained(forks, settings, tmp_path / "run", kill_at=1)["status"] == -9
    (tmp_path / "run" / file).unlink()
    refused = trained(forks, settings, tmp_path / "run")
    assert (
        refused["status"] == 7 and file in refused["said"] and "Add --from-scratch to move it aside" in refused["said"]
    )


@pytest.mark.parametrize(
    "changed", [{"lora": {"r": 4, "dropout": 0.2}}, {"memory": {"optimizer": "sgd", "kernels": "off"}}]
)
def test_what_a_checkpoint_is_made_by_cannot_be_another(forks, begun, changed):
    refused = forks(begun | changed, options={"accept_changes": True})
    assert refused["status"] == 7 and "holds a run with another " in refused["said"]
    assert "Add --from-scratch to move it aside, or set another run_dir." in refused["said"]


def test_other_data_is_refused_with_the_difference_or_accepted(forks, begun, tmp_path):
    file = Path(begun["data"])
    rows = file.read_text().splitlines()
    file.write_text("\n".join([rows[0], rows[1].replace("red", "tan"), *rows[2:]]) + "\n")
    refused = forks(begun)
    assert refused["status"] == 7 and "another data: 1 of 16 rows, the first being rows.jsonl:2\n" in refused["said"]
    file.write_text("\n".join(rows[:-1]) + "\n")
    refused = forks(begun)
    assert refused["status"] == 7 and "another data: 16 rows before, 15 now\n" in refused["said"]
    accepted = forks(begun, options={"accept_changes": True})
    assert accepted["status"] == 0 and "accepted: another data: 16 rows before, 15 now" in accepted["said"]


def test_touched_and_moved_files_are_the_same_data(forks, begun, straight, tmp_path):
    for file in tmp_path.glob("rows*"):
        file.touch()
    assert forks(begun)["status"] == 0
    assert weights_of(tmp_path / "run") == weights_of(straight[0])


def test_a_run_of_fewer_steps_than_were_taken_is_refused(forks, begun):
    refused = forks(begun | {"train": begun["train"] | {"max_steps": 1}}, options={"accept_changes": True})
    assert refused["status"] == 7
    assert "has taken 2 steps, and this run has only 1\n  Raise train.num_train_epochs" in refused["said"]


def test_other_packs_of_the_same_rows_are_refused(forks, begun):
    stored = Path(begun["run_dir"]) / "rows.npz"
    with np.load(stored) as found:
        np.savez(stored, **dict(found) | {"packs": np.array("0" * 64)})
    refused = forks(begun)
    assert refused["status"] == 7 and "packs: the same rows are packed in another way" in refused["said"]
    stored.write_bytes(b"PK")
    refused = forks(begun)
    assert refused["status"] == 7 and "rows.npz is damaged or missing, so that it cannot be compared" in refused["said"]


@pytest.mark.slow
def test_two_runs_at_once_do_not_share_a_folder(forks, settings, tmp_path):
    with Forks() as others:
        go = tmp_path / "go"
        job = others.begin(settings | {"run_dir": str(tmp_path / "run")}, hold_at=[2, str(go)])
        while not (tmp_path / "run/metrics.jsonl").exists():
            time.sleep(0.01)
        refused = trained(forks, settings, tmp_path / "run")
        moved = trained(forks, settings, tmp_path / "run", options={"from_scratch": True})
        go.touch()
        done = others.end(job)
    for each in (refused, moved):
        assert each["status"] == 7 and "is in use by process " in each["said"]
    assert done["status"] == 0, done["said"]


def test_a_run_that_goes_on_encodes_nothing_that_was_used(begun, monkeypatch):
    run = start(make_recipe(begun))
    seen = []
    encode = type(run.encoder).encode
    monkeypatch.setattr(
        type(run.encoder), "encode", lambda self, sample: seen.append(sample.id) or encode(self, sample)
    )
    run.walk()
    left = run.schedule.packs[2 * run.schedule.per_step :]
    assert seen == [run.prepared.train[index].id for pack in left for index in pack]


def test_what_was_logged_half_is_forgotten(begun):
    metrics = Path(begun["run_dir"]) / "metrics.jsonl"
    with metrics.open("ab") as file:
        file.write(b'{"step": 2, "lo\0\0\n{"step": 2, "loss": 1.')  # as a lost disk and a kill leave it
    run = start(make_recipe(begun))
    run.walk()
    steps = [log["step"] for log in logs_of(Path(begun["run_dir"])) if "loss" in log]
    assert steps == list(range(1, run.schedule.steps + 1))


def test_rows_that_were_skipped_before_stay_counted(begun):
    rejects = Path(begun["run_dir"]) / "rejects.jsonl"
    rejects.write_text('{"where": "rows.jsonl:3"}\n{"where": "rows.js')
    start(make_recipe(begun))
    assert lines_of(rejects) == [{"where": "rows.jsonl:3"}] and rejects.read_text().count("\n") == 1


def test_lines_wait_for_room_on_the_disk(tmp_path, caplog):
    lines = JsonLines(tmp_path / "no" / "metrics.jsonl")
    lines.append({"step": 1})
    lines.append({"step": 2})
    assert caplog.text.count("metrics.jsonl cannot be written for now: No such file or directory") == 1
    lines.file.parent.mkdir()
    lines.append({"step": 3})
    assert [line["step"] for line in lines_of(lines.file)] == [1, 2, 3]


def test_a_run_directory_that_cannot_be_made_is_a_disk_error(begun, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"run_dir: .*/file/run cannot be written: Not a directory\n  Make room there"):
        start(make_recipe(begun | {"run_dir": str(tmp_path / "file/run")}))


def test_lines_that_cannot_be_written_anew_are_a_disk_error(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    monkeypatch.setattr(os, "replace", None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.close(99999))
    with pytest.raises(DiskError, match=r"metrics.jsonl cannot be written: Bad file descriptor\n  Make room there"):
        lines.rewind(1)


def test_a_name_that_is_no_text_has_a_digest(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(picture(1))
    sample = parse({"images": [name], "messages": chat("a", "b")["messages"]}, "row", MediaFolder(tmp_path))
    other = parse(chat("a", "b", images=(1,)), "row", None)
    assert content_of(sample).digest != content_of(other).digest


def test_lengths_that_cannot_be_kept_are_told_of(begun, tmp_path, caplog, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MANTIS_LITE_CACHE", str(tmp_path / "file"))
    start(make_recipe(begun | {"run_dir": str(tmp_path / "other")}))
    assert re.search(r"lengths are not remembered: .*/file/lengths-\w+ cannot be written: ", caplog.text)


def test_the_best_checkpoint_is_kept_and_gone_back_to(begun, tmp_path):
    """By the held-out loss, which learning makes less: where more is better, the first steps are best."""
    train = {"learning_rate": 0.02, "lr_scheduler_type": "constant", "samples_per_step": 4, "save_total_limit": 1}
    best = {"save_steps": 1, "load_best_model_at_end": True, "max_steps": 4, "metric_for_best_model": "eval_loss"}
    more = {"data": {"sources": begun["data"], "eval": 0.2}, "eval": {"every": 1}, "run_dir": str(tmp_path / "best")}
    run = start(make_recipe(begun | more | {"train": train | best | {"greater_is_better": True}}))
    folder = run.train()
    losses = {log["step"]: log["eval_loss"] for log in logs_of(tmp_path / "best") if "eval_loss" in log and log["step"]}
    best_step = max(losses, key=losses.get)
    assert best_step < 4 and [step_of(path) for path in saved(tmp_path / "best")] == [4, best_step]
    best = tmp_path / f"best/checkpoint-{best_step}"
    kept, found = (load_file(path / "adapter_model.safetensors") for path in (best, folder))
    assert json.loads((best.parent / "checkpoint-4/trainer_state.json").read_text())["best_model_checkpoint"] == str(
        best
    )
    assert all(torch.equal(kept[name], value) for name, value in found.items())
