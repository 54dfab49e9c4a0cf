"""A tracker that is down, full, broken or not there never stops a run; what it missed is said."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import BY_CLOCK, chat, logs_of, recipe, write_rows
from transformers import TrainerCallback

from mantis_lite.errors import RecipeError
from mantis_lite.training import start as starts
from mantis_lite.training.trackers import EVENTS, PATIENCE, Tracker, trackers

STEPS = 5


class Down(TrainerCallback):
    """A tracker that fails in every event, from `first` on and `times` times; it counts how often it was called."""

    def __init__(self, first: int = 0, times: int = 10**6) -> None:
        self.calls, self.first, self.times = [], first, times

    def fail(self, event: str) -> None:
        self.calls.append(event)
        if self.first <= len(self.calls) - 1 < self.first + self.times:
            raise ConnectionError("the server\n is down")


for name in EVENTS:
    setattr(Down, name, lambda self, *_, event=name, **__: self.fail(event))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [chat("<image>what is it?", f"number {i}", images=(i,)) for i in range(6)]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def settings(data: str, run_dir: Path, **train):
    own = {"max_steps": STEPS, "save_strategy": "no", "gradient_accumulation_steps": 1}
    packing = {"max_length": 600}
    return recipe("tiny", data=data, run_dir=str(run_dir), packing=packing, train=own | train)


def trained(data: str, run_dir: Path, *callbacks: TrainerCallback, **train) -> list[dict]:
    """What a run logged, less what differs by the clock."""
    starts.start(settings(data, run_dir, **train), callbacks).train()
    return [{key: value for key, value in log.items() if not key.endswith(BY_CLOCK)} for log in logs_of(run_dir)]


def warned(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mantis_lite.training.trackers"]


def test_one_that_fails_in_every_event_changes_nothing(data, tmp_path, caplog):
    without = trained(data, tmp_path / "without")
    assert warned(caplog) == []
    down = Down()
    assert trained(data, tmp_path / "with", Tracker(down)) == without
    assert len([log for log in without if "loss" in log]) == STEPS
    first, gone, missed = warned(caplog)
    assert first == (
        f"Down failed in {down.calls[0]}: ConnectionError: the server is down; "
        "training goes on, and metrics.jsonl has what it misses"
    )
    assert gone == "Down failed 3 times in a row, and is told nothing more" and len(down.calls) == PATIENCE
    assert missed.startswith("Down missed ") and missed.endswith(" events of this run or more; metrics.jsonl has all")


def test_one_that_fails_now_and_then_is_kept(data, tmp_path, caplog):
    shaky, steady = Down(first=5, times=PATIENCE - 1), Down(first=10**6)
    trained(data, tmp_path / "run", Tracker(shaky), Tracker(steady))
    assert shaky.calls == steady.calls  # what a tracker that never fails is told
    assert set(shaky.calls) >= {"on_train_begin", "on_step_end", "on_log", "on_train_end"}
    first, missed = warned(caplog)
    assert first.startswith(f"Down failed in {shaky.calls[5]}") and missed.startswith("Down missed 2 events")


def test_an_interrupt_is_no_failure():
    class Interrupted(TrainerCallback):
        def on_log(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tracker(Interrupted()).on_log(None, None, None)


def test_only_what_a_tracker_listens_to_is_passed_on():
    class Logs(TrainerCallback):
        def on_log(self, *_, **__): ...

    assert [event for event in EVENTS if event in vars(Tracker(Logs()))] == ["on_log"]


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("nonsense", "train.report_to: nonsense is not supported, only .*\n  Install it, or leave it out"),
        (["tensorboard", "nonsense"], "train.report_to: nonsense is not supported"),
        ("clearml", "train.report_to: clearml is not installed\n  Install it, or leave it out"),
        ("flyte", "train.report_to: FlyteCallback requires flytekit"),
        (3, "train.report_to: 'int' object is not iterable"),
    ],
)
def test_one_that_is_not_there_is_an_error_before_anything_is_read(report_to, message, tmp_path, monkeypatch):
    assert find_spec("clearml") is None and find_spec("flytekit") is None
    monkeypatch.setattr(starts, "make_plan", None)
    with pytest.raises(RecipeError, match=message):
        starts.start(settings("nowhere.json", tmp_path / "run", report_to=report_to))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("none", ["none", ["none"], None, []])
def test_none(none):
    assert trackers(none) == []


def test_the_trainer_makes_no_tracker_itself(data, tmp_path, monkeypatch):
    """Also not the one that a cluster's environment asks for."""
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "https://127.0.0.1:9")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", "x")
    run = starts.start(settings(data, tmp_path / "run"))
    made = [type(callback) for callback in run.trainer.callback_handler.callbacks]
    assert not [kind for kind in made if kind.__module__.startswith("transformers.integrations")]


needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its writer's own
def test_tensorboard(data, tmp_path, caplog, monkeypatch):
    """Its files there, a folder that cannot be made, and one that goes while the run writes into it."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    logs = trained(data, tmp_path / "good", report_to="tensorboard")
    assert list((tmp_path / "board").glob("events.*")) and warned(caplog) == []

    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file/board"))
    assert trained(data, tmp_path / "bad", report_to=["tensorboard"]) == logs
    assert [message.partition(":")[0] for message in warned(caplog)] == [
        "TensorBoard failed in on_train_begin",
        "TensorBoard failed 3 times in a row, and is told nothing more",
        f"TensorBoard missed {1 + STEPS + 1 + 1} events of this run or more; metrics.jsonl has all",
    ]

    class Gone(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                shutil.rmtree(tmp_path / "gone/board")

    caplog.clear()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "gone/board"))
    assert trained(data, tmp_path / "gone", Gone(), report_to="tensorboard") == logs
    assert "TensorBoard failed in on_log: FileNotFoundError" in warned(caplog)[0]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_whose_server_is_down(data, tmp_path):
    """In a process of its own: wandb leaves another behind. A connection to port 9 is refused at once."""
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "1"}
    words = ["train", "quickstart", f"data={data}", f"run_dir={tmp_path / 'run'}", "packing.max_length=600"]
    words += ["train.max_steps=3", "train.report_to=wandb", "train.samples_per_step=1"]
    done = subprocess.run(
        [sys.executable, "-m", "mantis_lite", *words],
        capture_output=True,
        text=True,
        env=os.environ | away | {"WANDB_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Wandb failed in on_train_begin" in done.stderr and "Wandb missed " in done.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
