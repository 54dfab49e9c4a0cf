"""Two processes train as one with twice the packs a step: by DDP and DeepSpeed, stopped and not, and on as one."""

import json
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from clips_made import make
from families import save
from helpers import chat, logs_of, losses, write_rows
from safetensors.torch import load_file

from benchmarks.forks import Forks
from mantis_lite.training.checkpoints import saved

pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="make test-slow installs DeepSpeed")
BY_DEEPSPEED = [pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3", "zero3_offload")]
STRATEGIES = ["ddp", *BY_DEEPSPEED]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def idefics2(tmp_path_factory) -> Path:
    return save("idefics2", tmp_path_factory.mktemp("idefics2"))


def chat_rows(folder: Path) -> str:
    """Rows with pictures of several shapes, and as many without."""
    rows = [
        chat(f"what is number {i}?", f"number {i} is red", images=(i,) if i % 2 else (), id=f"n{i}") for i in range(18)
    ]
    return write_rows(folder / "rows.jsonl", rows)


def scored_rows(folder: Path) -> str:
    rows = [
        {
            "images": chat("", images=(i,) if i % 3 else ())["images"],
            "prompt": f"row {i}",
            "labels": {"a": i % 4, "b": 1},
        }
        for i in range(18)
    ]
    return write_rows(folder / "scored.jsonl", rows)


def settings_of(model: Path, folder: Path, task: str = "chat", **more) -> dict:
    """A short run whose parts all train, but for the tower; its steps are those of two processes."""
    method = more.pop("method", "full")
    rows = chat_rows(folder) if task == "chat" else scored_rows(folder)
    return {
        "model": str(model),
        "data": {"sources": rows, "eval": 0.2},
        "task": task,
        "method": method,
        "memory": {"kernels": "off"},
        "packing": {"max_length": 160, "balance": 2},
        "eval": {"every": 2},
        "train": {"learning_rate": 0.01, "gradient_accumulation_steps": 2, "save_steps": 1, "seed": 3, "max_steps": 4}
        | {"adam_epsilon": 1e-3},  # or a number whose gradient is nearly none goes by how that was rounded
        "trainable": {"lr": {"projector": 0.02} if method == "full" else {}},
        **({"head": {"problem": "regression"}} if task == "classify" else {}),
        **more,
    }


def trained(forks, settings: dict, run_dir: Path, strategy: str = "single", ranks: int | None = None, **job) -> dict:
    launch = {} if ranks is None else {"launch": {"strategy": strategy, "gpus": ranks}}
    return forks(settings | {"run_dir": str(run_dir)} | launch, ranks=ranks, **job)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    (file,) = [*run_dir.glob("adapter/*.safetensors"), *run_dir.glob("model/*.safetensors")]
    return load_file(file)


def evaluated(run_dir: Path) -> list[float]:
    return [log["eval_loss"] for log in logs_of(run_dir) if "eval_loss" in log]


def assert_same(run_dir: Path, other: Path) -> None:
    """The same losses, gradients, evaluations and weights."""
    for of in (losses, evaluated, lambda run: [log["grad_norm"] for log in logs_of(run) if "grad_norm" in log]):
        assert of(run_dir) == pytest.approx(of(other), rel=CLOSE, abs=CLOSE)
    left, right = weights(run_dir), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        torch.testing.assert_close(
            left[name], right[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )


@pytest.fixture(scope="module")
def alone(forks, idefics2, tmp_path_factory):
    """One process, with twice the accumulation, of each task and method."""
    runs: dict[tuple, tuple[dict, Path]] = {}

    def run(task: str, method: str) -> tuple[dict, Path]:
        if (task, method) not in runs:
            folder = tmp_path_factory.mktemp("alone")
            settings = settings_of(idefics2, folder, task, method=method)
            answer = trained(forks, settings, folder / "run")
            assert answer["status"] == 0, answer["said"]
            runs[task, method] = settings, folder / "run"
        return runs[task, method]

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("task", "method"), [("chat", "full"), ("chat", "lora"), ("classify", "full")])
def test_two_processes_train_as_one(forks, alone, tmp_path, strategy, task, method):
    settings, one = alone(task, method)
    answer = trained(forks, settings, tmp_path / "run", strategy, 2)
    assert answer["status"] == 0, answer["said"]
    assert_same(tmp_path / "run", one)
    steps = [int(folder.name.rpartition("-")[2]) for folder in saved(tmp_path / "run")]
    assert steps == [4, 3, 2, 1]


@needs_deepspeed
@pytest.mark.parametrize("name", ["llava", "fuyu", "smolvlm", "qwen2_vl"])
def test_every_layout_trains_in_parts(forks, tmp_path, name):
    """Towers of all kinds, a projector within one, embeddings that are tied, rotary positions in rows."""
    settings = settings_of(save(name, tmp_path / "model"), tmp_path)
    settings |= {"packing": {"max_length": 400, "balance": 2}}
    settings["train"] |= {"max_steps": 2, "save_steps": 2}
    for run_dir, launch in [("one", ()), ("two", ("zero3", 2))]:
        answer = trained(forks, settings, tmp_path / run_dir, *launch)
        assert answer["status"] == 0, answer["said"]
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=needs_deepspeed)])
def test_clips_pictures_and_text_alone_do_not_wait_for_each_other(forks, idefics2, tmp_path, strategy):
    clip = make(tmp_path / "clip.mp4", frames=12)
    rows = [chat(f"what is {i}?", f"{i} is red", images=(i,) if i % 3 == 1 else ()) for i in range(18)]
    for row in rows[::3]:
        row["video"] = clip.name
    settings = settings_of(idefics2, tmp_path) | {"task": "video", "media": {"num_frames": 2}}
    settings |= {"data": write_rows(tmp_path / "mixed.jsonl", rows), "eval": {}}
    for run_dir, launch in [("one", ()), ("two", (strategy, 2))]:
        answer = trained(forks, settings, tmp_path / run_dir, *launch)
        assert answer["status"] == 0, answer["said"]
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", [2, 1])
def test_a_run_goes_on_with_as_many_processes_or_others(forks, alone, tmp_path, strategy, ranks):
    """Both are killed at once, after the second step; one or two go on."""
    settings, one = alone("chat", "full")
    killed = trained(forks, settings, tmp_path / "run", strategy, 2, kill_at=3, saved=False, faulty=1)
    assert killed["status"] == -signal.SIGKILL
    assert saved(tmp_path / "run")[0].name == "checkpoint-2"
    answer = trained(forks, settings, tmp_path / "run", strategy, ranks)
    assert answer["status"] == 0, answer["said"]
    assert "goes on from checkpoint-2" in answer["said"]
    assert_same(tmp_path / "run", one)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(forks, alone, tmp_path, strategy):
    settings, one = alone("chat", "full")
    stopped = trained(forks, settings, tmp_path / "run", strategy, 2, signals=[(2, signal.SIGTERM)], faulty=1)
    assert stopped["status"] == 128 + signal.SIGTERM, stopped["said"]
    assert [folder.name for folder in saved(tmp_path / "run")] == ["checkpoint-2", "checkpoint-1"]
    assert trained(forks, settings, tmp_path / "run", strategy, 2)["status"] == 0
    assert_same(tmp_path / "run", one)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_no_number_in_one_process_is_skipped_by_all(forks, alone, tmp_path, strategy):
    settings, _ = alone("chat", "lora")
    answer = trained(forks, settings, tmp_path / "run", strategy, 2, poison=(2, "gradient"), faulty=1)
    assert answer["status"] == 0, answer["said"]
    (line,) = [json.loads(text) for text in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert (line["step"], line["found"]) == (2, "the gradient is not finite")
    assert len(line["samples"]) > 4, "all packs of the step, of both processes"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_a_disk_that_one_process_cannot_write_to_ends_all_with_the_last_checkpoint_whole(
    forks, alone, tmp_path, strategy
):
    settings, one = alone("chat", "full")
    limit = {"limit": (2, 1000)}  # bytes that a file may have, from the second step on
    answer = trained(forks, settings, tmp_path / "run", strategy, 2, **limit, faulty=0 if strategy == "ddp" else 1)
    assert answer["status"] == 6, answer["said"]
    assert [folder.name for folder in saved(tmp_path / "run")] == ["checkpoint-1"]
    assert trained(forks, settings, tmp_path / "run", strategy, 2)["status"] == 0
    assert_same(tmp_path / "run", one)


def test_a_checkpoint_in_parts_does_not_go_on_as_a_whole(forks, alone, tmp_path):
    settings, _ = alone("chat", "full")
    killed = trained(forks, settings, tmp_path / "run", "ddp", 2, kill_at=2)
    assert killed["status"] == -signal.SIGKILL
    answer = trained(forks, settings, tmp_path / "run", "zero2", 2)
    assert answer["status"] == 7
    assert 'holds a run with another launch.strategy: "ddp" before, "zero2" now' in answer["said"]


def test_a_second_run_in_the_folder_is_refused_by_all_its_processes(forks, alone, tmp_path):
    settings, _ = alone("chat", "lora")
    with Forks() as others:
        begun = others.begin(settings | {"run_dir": str(tmp_path / "run")}, hold_at=(2, str(tmp_path / "go")))
        while not list(tmp_path.glob("run/checkpoint-1")):
            time.sleep(0.05)
        answer = trained(forks, settings, tmp_path / "run", "ddp", 2)
        (tmp_path / "go").touch()
        assert others.end(begun)["status"] == 0
    assert answer["status"] == 7
    assert "is in use by process" in answer["said"]
