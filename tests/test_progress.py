"""How a run is shown: a bar at a terminal, lines in a log file, JSON lines, or nothing."""

import json
import os
import pty
import re
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from helpers import chat, logs_of, write_rows
from typer.testing import CliRunner

import mantis_lite
from mantis_lite.cli import app
from mantis_lite.errors import DivergedError, RecipeError
from mantis_lite.training import progress as shown
from mantis_lite.training.progress import Lines, in_words, progress
from mantis_lite.training.run import Run

STEPS = 3
MODES = {"lines": (), "json": ("--json",), "quiet": ("--quiet",)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progress")
    rows = [chat(f"What is number <image> {at}?", f"It is {at}.", images=(at,)) for at in range(8)]
    return write_rows(folder / "rows.jsonl", rows)


def words_of(data, run_dir) -> list[str]:
    own = ["train.logging_steps=1", "eval.every=2", "eval.generate=0", "data.eval=0.3", f"train.max_steps={STEPS}"]
    return ["train", "quickstart", f"data={data}", f"run_dir={run_dir}", "packing.max_length=400", *own]


@pytest.fixture(scope="module")
def said(data, tmp_path_factory):
    """What each mode writes to the output, of a run of its own, with the folder of that."""
    found = {}
    for mode, words in MODES.items():
        run_dir = tmp_path_factory.mktemp(mode) / "run"
        result = CliRunner().invoke(app, [*words_of(data, run_dir), *words])
        assert result.exit_code == 0, result.output
        found[mode] = result.stdout, run_dir
    return found


def test_a_log_file_has_lines_and_no_codes(said):
    text, run_dir = said["lines"]
    assert "\x1b" not in text and "\r" not in text
    first, *_, last = [log for log in logs_of(run_dir) if "loss" in log]
    assert f"step 1/{STEPS}  loss {first['loss']:.4g}  lr" in text and f"step {STEPS}/{STEPS}  " in text
    assert f"loss {last['loss']:.4g}  lr {last['learning_rate']:.2g}  {last['tokens_per_second']:,.0f} tokens/s" in text
    assert len(re.findall(r"^step \d+  held out: loss ", text, re.M)) == 3
    for line in ("what trains", "language_model", "notice: attention: ", "8 rows read", f"-> {run_dir}"):
        assert line in text
    assert f"\nsaved {run_dir / 'adapter'}; report.html" in text
    assert f"\n  mantis-lite chat {run_dir} " in text and f": mantis-lite watch {run_dir}\n" in text


def test_json_lines_are_nothing_else_and_all_that_was_logged(said):
    text, run_dir = said["json"]
    start, *logs, end = [json.loads(line) for line in text.splitlines()]
    assert (start["event"], start["run_dir"], start["steps"]) == ("start", str(run_dir), STEPS)
    assert {part["part"] for part in start["parts"]} == {"language_model", "projector", "vision_tower"}
    kept = [{k: v for k, v in log.items() if k != "time"} for log in logs_of(run_dir)]
    assert [{k: v for k, v in log.items() if k != "event"} for log in logs] == kept
    assert (end["event"], end["how"], end["saved"]) == ("end", "finished", str(run_dir / "adapter"))
    assert end["next"][0] == ["ask it", f"mantis-lite chat {run_dir}"]


def test_json_says_how_a_run_ended_and_has_no_nan(data, tmp_path, capsys):
    recipe = mantis_lite.load_recipe("quickstart", words_of(data, tmp_path / "run")[2:])
    poisoned = SimpleNamespace(is_world_process_zero=True, global_step=1)
    with progress("json", print) as (callback,):
        callback.on_log(None, poisoned, None, {"loss": float("nan"), "epoch": 1.0, "spike": True})
    assert json.loads(capsys.readouterr().out) == {"event": "log", "step": 1, "loss": None, "epoch": 1.0, "spike": True}
    with patch.object(Run, "walk", side_effect=DivergedError("step 2: no")), pytest.raises(DivergedError):
        mantis_lite.train(recipe, show="json")
    end = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (end["event"], end["saved"], end["how"]) == ("end", None, "step 2: no")
    assert end["next"] == [["go on where it stopped", f"mantis-lite train {tmp_path}/run/recipe.yaml"]]


def test_a_way_that_there_is_not_is_refused(data, tmp_path):
    with pytest.raises(
        RecipeError, match="show: Quiet is no way to show a run\n  Set one of auto, bar, lines, json, quiet"
    ):
        mantis_lite.train("quickstart", words_of(data, tmp_path / "run")[2:], show="Quiet")


def test_quiet_shows_nothing(said):
    assert said["quiet"][0] == "" and (said["quiet"][1] / "adapter").is_dir()


def test_quiet_and_json_are_one_too_many(data, tmp_path):
    result = CliRunner().invoke(app, [*words_of(data, tmp_path / "run"), "--quiet", "--json"])
    assert "--quiet: shows nothing, and --json every log\n  Leave one of them out." in str(result.exception)


def test_from_python_it_is_shown_as_well(data, tmp_path, capsys):
    settings = words_of(data, tmp_path / "run")[2:]
    mantis_lite.train("quickstart", settings)
    assert f"step {STEPS}/{STEPS}  loss" in capsys.readouterr().out
    recipe = mantis_lite.load_recipe("quickstart", [*settings[:1], f"run_dir={tmp_path / 'quiet'}", *settings[2:]])
    with pytest.raises(ValueError, match="train: overrides beside a Recipe\n  Give them to load_recipe"):
        mantis_lite.train(recipe, ["run_dir=x"])
    mantis_lite.train(recipe, show="quiet")
    assert capsys.readouterr().out == ""


class State:
    is_world_process_zero = True
    max_steps = 100_000
    global_step = 0


def test_a_line_comes_every_ten_seconds_and_for_every_evaluation(monkeypatch):
    now, lines, state = [0.0], [], State()
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    callback = Lines(lines.append)
    for step in range(1, 61):
        state.global_step = step
        callback.on_log(None, state, None, {"loss": 1.0})
        now[0] += 1
    assert [line.partition("/")[0] for line in lines] == [f"step {at}" for at in (1, 11, 21, 31, 41, 51)]
    callback.on_log(None, state, None, {"eval_loss": 0.5, "eval_runtime": 2.0, "epoch": 1.5})
    assert lines[-1] == "step 60  held out: loss 0.5"
    state.is_world_process_zero = False
    callback.on_log(None, state, None, {"eval_loss": 0.5, "eval_runtime": 2.0})
    assert len(lines) == 7


def test_a_line_has_what_was_logged():
    logs = {"loss": 0.81239, "learning_rate": 1e-4, "tokens_per_second": 12345.6, "seconds_left": 3723.4}
    assert in_words(logs) == "loss 0.8124  lr 0.0001  12,346 tokens/s  1:02:03 left"
    assert in_words(logs | {"memory_held_gib": 9.87}).endswith("12,346 tokens/s  9.9 GiB  1:02:03 left")
    assert in_words({"loss": 1.0}) == "loss 1"


@pytest.mark.slow
@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_has_a_bar(data, tmp_path, colour):
    """In a terminal of its own: rich asks it for its size, its colours, and whether it is one."""
    words = [
        sys.executable,
        "-m",
        "mantis_lite",
        *([] if colour else ["--no-color"]),
        *words_of(data, tmp_path / "run"),
    ]
    child, terminal = pty.fork()
    if not child:
        os.execve(words[0], words, os.environ | {"TERM": "xterm-256color", "COLUMNS": "160"})
    text = b""
    try:
        while piece := os.read(terminal, 65536):
            text += piece
    except OSError:  # the other end is closed
        pass
    assert os.waitpid(child, 0)[1] == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode())
    assert f"{STEPS}/{STEPS}" in plain and "tokens/s" in plain and "held out: loss" in plain
    assert bool(re.search(rb"\x1b\[[0-9;]*3[0-9]m|\x1b\[38;", text)) == colour
    assert text.count(b"\x1b[?25l") == text.count(b"\x1b[?25h"), "the cursor is back"
