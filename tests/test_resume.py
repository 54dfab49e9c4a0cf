"""A run that is killed goes on as if it had not been, or says why it cannot."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from clips_made import make
from helpers import chat, logs_of, write_rows

from benchmarks.forks import Forks

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
    clock = ("time", "runtime", "per_second", "total_flos")
    return [
        tuple((key, value) for key, value in log.items() if not key.endswith(clock))
        for log in logs_of(run_dir)
        if "loss" in log or "eval_loss" in log
    ]


def weights_of(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def trained(forks, settings, run_dir, **job) -> dict:
    return forks(settings | {"run_dir": str(run_dir)}, **job)


def chat_rows(folder: Path) -> str:
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,), id=f"n{i}") for i in range(16)]
    return write_rows(folder / "rows.jsonl", rows)


def of_task(task: str, folder, tmp_path: Path) -> dict:
    """A short run of a task: two epochs, so that it is stopped within one and at its end."""
    if task == "chat":
        return settings_of(folder, {"sources": chat_rows(tmp_path), "eval": 0.2}, eval={"every": 2})
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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task", ["chat", "video", "classify"])
def test_a_run_killed_at_every_step_is_the_run_that_was_not(forks, llava_folder, tmp_path, task, workers):
    settings = of_task(task, llava_folder, tmp_path)
    settings["train"] |= {"num_train_epochs": 2, "samples_per_step": 4, "dataloader_num_workers": workers}
    straight = trained(forks, settings, tmp_path / "straight")
    assert straight["status"] == 0, straight["said"]
    steps = max(log["step"] for log in logs_of(tmp_path / "straight"))
    assert steps >= 4
    for step in range(1, steps + 1):
        # Once a step has been saved or, every other time, not yet: that one is taken twice.
        for saved in [True] if step % 2 else [False, True]:
            killed = trained(forks, settings, tmp_path / "killed", kill_at=step, saved=saved)
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
        if kills == 60:
            break
    assert kills == 60 and runs > 5


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"])
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
