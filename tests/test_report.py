"""A run's own page: it says what its files say, whatever became of the run, and a browser shows it and asks nobody."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from browser import NASTY, Page, browsed, needs_browser
from helpers import chat, logs_of, losses, write_rows
from transformers import TrainerCallback
from typer.testing import CliRunner

from mantis_lite.cli import app
from mantis_lite.data.packs import BLANK, Packs
from mantis_lite.data.schedule import Schedule
from mantis_lite.errors import DataError, RecipeError, Stopped
from mantis_lite.recipe_file import make_recipe
from mantis_lite.training import pace as paces
from mantis_lite.training import report as reports
from mantis_lite.training.charts import MOST, Line, line_of, svg
from mantis_lite.training.pace import Pace
from mantis_lite.training.page import COLUMNS, page
from mantis_lite.training.start import start
from mantis_lite.watch import watched

STEPS = 4


def settings_of(folder, run_dir, **more) -> dict:
    rows = [chat(f"What is number <image> {at}?", f"It is {at}.", images=(at,)) for at in range(9)]
    held_out = [chat(f"{NASTY} What is <image> and <image>?", f"{NASTY} Two.", images=(1, 2), id=NASTY)] * 2
    data = {"sources": write_rows(folder / "rows.jsonl", rows), "eval": write_rows(folder / "held_out.jsonl", held_out)}
    train = {"max_steps": STEPS, "samples_per_step": 2, "save_steps": 2}
    settings = {"model": "tiny", "data": data, "method": "lora", "packing": {"max_length": 400}, "train": train}
    return settings | {"eval": {"every": 2}, "run_dir": str(run_dir)} | more


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that has finished, whose rows would inject."""
    folder = tmp_path_factory.mktemp("report")
    start(make_recipe(settings_of(folder, folder / "run"))).train()
    return folder / "run"


@pytest.fixture
def copied(run_dir, tmp_path):
    """The run, with other facts."""

    def copy(**facts):
        shutil.copytree(run_dir, tmp_path / "run", dirs_exist_ok=True)
        known = json.loads((run_dir / "report.json").read_text()) | facts
        (tmp_path / "run/report.json").write_text(json.dumps({k: v for k, v in known.items() if v is not ...}))
        return tmp_path / "run"

    return copy


def copied_with(folder, ended):
    """A run's folder, with another end."""
    facts = json.loads((folder / "report.json").read_text()) | {"ended": ended}
    (folder / "report.json").write_text(json.dumps({k: v for k, v in facts.items() if v is not ...}))
    return folder


def read(folder) -> tuple[Page, str]:
    text = page(folder).decode()
    return Page(text), text


def test_it_says_what_was_logged(run_dir):
    assert (run_dir / "report.html").read_bytes() == page(run_dir)
    seen, text = read(run_dir)
    logs = logs_of(run_dir)
    steps = [log for log in logs if "loss" in log]
    evaluations = {log["step"]: log for log in logs if "eval_loss" in log}
    titles = [title.partition(":")[0] for title in seen.texts["figcaption"]]
    assert titles[:4] == ["loss", "learning rate", "norm of the gradient", "tokens a second"]
    assert titles[4:] == ["samples a second", "how full packs are, %", "GiB of the host's memory"]
    last = steps[-1]["loss"], evaluations[STEPS]["eval_loss"]
    assert "loss: training {:.4g}, held out {:.4g}".format(*last) in seen.texts["figcaption"]
    assert len(seen.texts["svg"]) == len(titles) and 'http-equiv="refresh"' not in text
    assert f"finished, step {STEPS} of {STEPS}" in " ".join(seen.texts["p"][0].split())
    rows = [" ".join(row.split()) for row in seen.texts["tr"]]
    before, after = evaluations[0]["eval_loss"], last[1]
    assert set(evaluations) == {0, 2, STEPS} and "Before and after" in seen.texts["h2"]
    assert any(re.fullmatch(rf"loss\s*{before:.4g}\s*{after:.4g}", row) for row in rows)


def test_answers_to_held_out_rows_stand_side_by_side(run_dir):
    seen, _ = read(run_dir)
    said = [json.loads(line) for line in (run_dir / "generations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in said] == [0, 0, 2, 2, STEPS, STEPS]
    assert len(seen.texts["article"]) == 2 and len(seen.having("img", "src")) == 4
    for line, article in zip(said[::2], [seen.texts["article"][0]] * 3, strict=True):
        assert f"step {line['step']}" in article and line["answer"] in article
    assert NASTY in seen.texts["article"][0] and {tag for tag, _ in seen.tags}.isdisjoint({"script", "iframe", "form"})


def test_of_many_answers_the_first_and_the_last_are_shown(copied):
    folder = copied()
    line = json.loads((folder / "generations.jsonl").read_text().splitlines()[0])
    lines = [line | {"step": at, "answer": f"said at {at}", "expected": "said at 29"} for at in range(30)]
    (folder / "generations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    article = read(folder)[0].texts["article"][0]
    shown = [int(at) for at in re.findall(r"said at (\d+)", article.replace("said at 29", "", 1))]
    assert shown == [0, *range(30 - COLUMNS + 1, 30)] and f"{30 - COLUMNS} more times" in article


def test_of_many_rows_some_are_shown_and_the_others_counted(copied):
    folder = copied(answered_left=1484)
    assert "1,484 more rows are answered: generations.jsonl" in read(folder)[1]
    line = json.loads((folder / "generations.jsonl").read_text().splitlines()[0]) | {"answer": " "}
    (folder / "generations.jsonl").write_text(json.dumps(line | {"answer": ""}) + "\n")
    assert "(nothing)" in read(folder)[0].texts["article"][0]


def test_ticks_are_numbers_that_can_be_read():
    def ticks(values, anchor):
        drawn = svg([Line("rate", list(range(1, len(values) + 1)), values)], "rate")
        found = re.findall(rf"text-anchor: {anchor}\"[^>]*>([^<]*)</text>", drawn)
        return [float(text.replace(",", "")) for text in found]

    assert ticks([1e-4, 5e-5, 1e-6], "end")[-1] == 1e-4  # and not 1, with a power of ten elsewhere
    assert 12_000 in ticks([10_000, 12_000, 14_000], "end")
    assert ticks([1.0, 2.0, 3.0], "middle") == [1, 2, 3]


def test_the_commands_are_ones(run_dir, monkeypatch):
    seen, _ = read(run_dir)
    commands = [shlex.split(text) for text in seen.texts["pre"] if text.startswith("mantis-lite")]
    assert [words[1] for words in commands] == ["chat", "evaluate", "merge", "serve", "push"]
    result = CliRunner().invoke(app, [*commands[0][1:], "--prompt", "What?", "--max-new-tokens", "2"])
    assert result.exit_code == 0, result.output


def test_a_card_is_measured_against_the_estimate(copied):
    folder = copied(estimate={"tensors": 9.5, "total": 10.25}, gpus=8)
    lines = [log | {"memory_gib": 9.25, "memory_held_gib": 9.75} if "loss" in log else log for log in logs_of(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen, text = read(folder)
    (memory,) = [title for title in seen.texts["figcaption"] if title.startswith("GiB of the GPU")]
    assert memory.endswith("measured 9.25, estimated 9.50") and "8 processes; memory is the first one's" in text
    tiles = [" ".join(tile.split()) for tile in seen.texts["div"]]
    assert "9.25GiB of the GPU, tensors, 9.50 estimated" in tiles
    assert "9.75GiB held by the allocator, 10.25 estimated in all" in tiles
    assert "no estimate: why" in read(copied(estimate={"why_not": "why"}))[1]


def test_a_run_that_was_killed_is_told_from_one_that_trains(copied):
    folder, host = copied(ended=...), f"{socket.gethostname()}\n"
    assert (folder / ".lock").read_text() == "" and "killed" in read(folder)[0].texts["p"][0]
    (folder / ".lock").write_text(f"process {os.getpid()} on {host}")
    for ended in (..., {"how": "stopped, before it went on", "time": 1.0}):
        seen, text = read(copied_with(folder, ended))
        assert "training, step" in " ".join(seen.texts["p"][0].split()) and 'http-equiv="refresh"' in text
    copied_with(folder, ...)
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (folder / ".lock").write_text(f"process {int(done.stdout)} on {host}")
    seen, text = read(folder)
    assert "killed, or its machine has failed" in seen.texts["p"][0] and 'http-equiv="refresh"' in text
    os.utime(folder / ".lock", (1, 1))  # this process's number was another's, before
    (folder / ".lock").write_text(f"process {os.getpid()} on {host}")
    os.utime(folder / ".lock", (1, 1))
    assert "killed" in read(folder)[0].texts["p"][0]
    (folder / ".lock").write_text("process 1 on elsewhere\n")
    assert "training, step" in " ".join(read(folder)[0].texts["p"][0].split())


def test_what_was_skipped_and_what_spiked_is_said(copied):
    folder = copied()
    skipped = {"step": 3, "found": "the loss is not finite", "samples": [NASTY, "rows.jsonl:2"]}
    (folder / "skipped.jsonl").write_text((json.dumps(skipped) + "\n") * 22)
    lines = [log | {"spike": True} if log["step"] == 2 else log for log in logs_of(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = "".join(read(folder)[0].texts["dl"])
    assert shown.count(f"step 3: the loss is not finite, in the pack of {NASTY}, rows.jsonl:2") == 20
    assert "2 more, in skipped.jsonl" in shown and "the loss was far above its mean in step 2" in shown


class Ends(TrainerCallback):
    def __init__(self, does) -> None:
        self.does = does

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.does()


def test_a_stopped_run_says_how_to_go_on_and_does(tmp_path):
    settings = settings_of(tmp_path, tmp_path / "run")
    with pytest.raises(Stopped) as raised:
        start(make_recipe(settings), [Ends(lambda: os.kill(os.getpid(), signal.SIGTERM))]).train()
    seen, text = read(tmp_path / "run")
    assert str(raised.value) in seen.texts["p"][0] and "step 2 of 4" in text
    (command,) = [shlex.split(each) for each in seen.texts["pre"] if each.startswith("mantis-lite")]
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    seen, text = read(tmp_path / "run")
    assert "finished, step 4 of 4" in " ".join(seen.texts["p"][0].split()) and "gone on after step 2" in text
    assert [log["step"] for log in logs_of(tmp_path / "run") if "loss" in log] == [1, 2, 3, 4]


def test_a_run_that_fails_says_by_what(tmp_path):
    def fail():
        raise RuntimeError(NASTY)

    with pytest.raises(RuntimeError):
        start(make_recipe(settings_of(tmp_path, tmp_path / "run")), [Ends(fail)]).train()
    assert f"RuntimeError: {NASTY}" in read(tmp_path / "run")[0].texts["p"][0]


def test_a_run_keeps_its_hold_on_its_folder_as_it_writes_its_page(tmp_path):
    """POSIX takes a lock away from a process that closes any of its openings of the file."""
    taking = "import sys, pathlib, mantis_lite.training.lock as lock; lock.Lock(pathlib.Path(sys.argv[1])).take()"
    tried = []

    def try_to_take():
        words = [sys.executable, "-c", taking, str(tmp_path / "run")]
        tried.append(subprocess.run(words, capture_output=True, text=True))

    start(make_recipe(settings_of(tmp_path, tmp_path / "run")), [Ends(try_to_take)]).train()
    assert (tmp_path / "run/report.html").exists() and "is in use by process" in tried[0].stderr


def test_a_disk_that_is_full_costs_the_page_alone(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reports, "write_whole", full)
    adapter = start(make_recipe(settings_of(tmp_path, tmp_path / "run"))).train()
    assert adapter.is_dir() and not (tmp_path / "run/report.html").exists()
    assert caplog.text.count("report.html cannot be written for now: No space left") == 1


def test_it_takes_a_hundredth_of_the_runs_time(monkeypatch, tmp_path):
    now, written = [0.0], []
    monkeypatch.setattr(reports.time, "monotonic", lambda: now[0])

    def write(*_, **__):
        written.append(now[0])
        now[0] += 0.5

    monkeypatch.setattr(reports, "write_whole", write)
    monkeypatch.setattr(reports, "page", lambda *_: b"")
    report = reports.Report(tmp_path, {})
    for _ in range(1000):
        report.on_log(None, None, None)
        now[0] += 1
    assert written[0] == 0 and np.diff(written).min() >= 50


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"holds no run, as there is no report.json\n  Name the folder of a run"):
            page(place)
    (tmp_path / "report.json").write_text('{"steps": ')
    with pytest.raises(DataError, match=r"report.json is damaged: .*\n  Go on with the run, which writes it anew"):
        page(tmp_path)


def test_a_line_of_many_points_is_thinned_by_means():
    logs = [{"step": at, "loss": float(at)} for at in range(1, 10_001)] + [{"step": 3, "loss": np.nan}, {"step": 4}]
    line = line_of(logs, "loss", "training")
    assert 200 < len(line.steps) <= MOST and line.steps[-1] == 10_000
    assert line.values == sorted(line.values) and abs(np.mean(line.values) - 5_000) < 50
    few = line_of([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}], "loss", "x", 100)
    assert (few.steps, few.values) == ([1.0], [200.0])
    drawn = svg([line, few._replace(flat=True)], "what")
    assert drawn.startswith("<svg") and "#" not in re.sub(r"(url\(|href=\")#", "", drawn), "a colour is no page's own"
    ids = [set(re.findall(r'id="(\w*[0-9a-f]{10})"', svg([line], what))) for what in ("one", "two")]
    assert ids[0].isdisjoint(ids[1]), "two charts of a page share no id"


def test_pace_is_counted_by_the_plan(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(paces.time, "monotonic", lambda: now[0])
    packs = Packs.of([[0, 1], [2], [BLANK], [0], [1], [2]])
    pace = Pace(Schedule(packs, [6], 2, touch=7), np.array([10, 20, 40]), 50)
    pace.begin(0)
    now[0] += 1000
    pace.rested()  # an evaluation before the first step
    now[0] += 2
    pace.stepped()
    first = pace.figures(1)
    assert (first["num_tokens"], first["tokens_per_second"], first["samples_per_second"]) == (70, 35, 1.5)
    assert (first["fill"], first["seconds_left"]) == (0.7, pytest.approx(2 * 77 / 70))
    now[0] += 1
    pace.stepped()
    now[0] += 50
    pace.rested()  # another, and a save
    now[0] += 4
    pace.stepped()
    last = pace.figures(3)
    assert (last["num_tokens"], last["tokens_per_second"], last["fill"]) == (147, 77 / 5, 77 / 200)
    assert (last["samples_per_second"], last["seconds_left"]) == (3 / 5, 0)
    assert pace.summary(3, 7.0) == {"train_samples_per_second": 6 / 7, "train_tokens_per_second": 21}
    pace.begin(1)  # as a run that goes on after a step
    now[0] += 7
    pace.stepped()
    assert pace.figures(2)["tokens_per_second"] == 17 / 7


@contextmanager
def serving(folder):
    with watched(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_watch_shows_the_page_to_this_machine_alone(copied):
    folder = copied()
    with serving(folder) as url:
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == page(folder) and answer.headers["Cache-Control"] == "no-store"
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1"):
            asked = urllib.request.Request(f"{url}/?x", headers={"Host": host})
            assert urllib.request.urlopen(asked).status == 200
        for code, path, host in ((404, "/etc/passwd", None), (404, "/../recipe.yaml", None), (403, "/", "evil.com:80")):
            asked = urllib.request.Request(url + path, headers={"Host": host} if host else {})
            with pytest.raises(urllib.error.HTTPError) as raised:
                urllib.request.urlopen(asked)
            assert raised.value.code == code
        with pytest.raises(RecipeError, match=r"--port: \d+ cannot be listened on: Address already in use\n  Choose"):
            watched(folder, int(url.rpartition(":")[2]))
        (folder / "report.json").unlink()
        with pytest.raises(urllib.error.HTTPError, match="503") as raised:
            urllib.request.urlopen(url)
        assert raised.value.headers["Refresh"] == "10", "it may begin anew"
    with pytest.raises(DataError, match="holds no run"):
        watched(folder, 0)


@needs_browser
def test_a_browser_shows_it_and_asks_nobody(run_dir, tmp_path):
    written = read(run_dir)[0]
    with serving(run_dir) as url:
        for number, place in enumerate(((run_dir / "report.html").as_uri(), url)):
            (tmp_path / str(number)).mkdir()
            document, log, asked = browsed(place, tmp_path / str(number))
            seen = Page(document)
            assert "CONSOLE" not in log and not asked
            assert [tag for tag, _ in seen.tags if tag != "tbody"] == [tag for tag, _ in written.tags if tag != "tbody"]
            assert seen.texts["title"] == ["run: finished"] and NASTY in seen.texts["article"][0]


@pytest.mark.slow
def test_a_run_that_is_killed_is_watched_to_its_end(tmp_path):
    settings_of(tmp_path, tmp_path / "run")
    words = [f"data={tmp_path}/rows.jsonl", f"data.eval={tmp_path}/held_out.jsonl", f"run_dir={tmp_path}/run"]
    words += ["train.max_steps=100000", "train.samples_per_step=2", "train.logging_steps=1", "packing.max_length=400"]
    command = [sys.executable, "-m", "mantis_lite", "train", "quickstart", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run/metrics.jsonl").exists() or not losses(tmp_path / "run"):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.5)
        with serving(tmp_path / "run") as url:
            seen = Page(urllib.request.urlopen(url).read().decode())
            assert "training, step" in " ".join(seen.texts["p"][0].split()) and "left" in seen.texts["p"][0]
            process.kill()
            process.wait()
            seen = Page(urllib.request.urlopen(url).read().decode())
            assert seen.texts["p"][0].startswith("killed, or its machine has failed")
    finally:
        process.kill()
        process.wait()
