"""Rows read by several processes are the rows read by one; a process that dies or is told to end hangs nothing."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from helpers import by_size, chat, recipe, write_rows

from mantis_lite.data.chunks import CHUNK, MOST_WORKERS, ROWS_EACH, workers_for
from mantis_lite.data.encode import Score
from mantis_lite.data.prepare import Prepared, Samples, prepare
from mantis_lite.errors import DataError, FitError, SampleError
from mantis_lite.process import cores, quota_of
from mantis_lite.recipe import HeadRecipe

ROWS = 3 * CHUNK + 40
WORKERS = 2
UNREADABLE, NO_TURNS = {"images": ["rows.jsonl"]}, {"messages": []}
TOO_LONG = {"messages": chat("Hi", "Ha" * 3000)["messages"], "images": []}


def write(folder: Path, changed: dict[int, dict] | None = None) -> str:
    """Rows of text with a picture now and then, some with a turn that is dropped; and some that are `changed`."""
    rows = [chat(f"Hi {at}", "Ho" * (at % 7), images=(at % 3,) if at % 50 == 0 else ()) for at in range(ROWS)]
    for at, row in enumerate(rows):
        row["id"] = str(at)
        if at % 9 == 0:
            row["messages"].insert(0, {"role": "assistant", "content": "Welcome"})
    path = Path(write_rows(folder / "rows.jsonl", rows))
    lines = path.read_text().splitlines()
    for at, change in (changed or {}).items():
        lines[at] = json.dumps(json.loads(lines[at]) | change)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def no_process_is_left():
    others = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= others


@pytest.fixture
def both(monkeypatch, tmp_path):
    """Prepares with this process alone and with several, neither of which remembers what the other measured."""

    def prepare_twice(path: str, encoder=None, head=None, every_fault=False, **settings) -> list[Prepared]:
        made = recipe(data={"sources": path} | settings, packing={"max_length": 4000})
        found = []
        for workers in (0, WORKERS):
            monkeypatch.setenv("MANTIS_LITE_CACHE", str(tmp_path / f"cache-{workers}"))
            more = {"task": "classify" if head else "chat", "head": head, "every_fault": every_fault}
            found.append(prepare(made.data, made.packing, encoder or by_size(), workers=workers, **more))
        return found

    return prepare_twice


def assert_same(one: Prepared, other: Prepared) -> None:
    for name in ("notices", "rows_read", "oversize", "labels"):
        assert getattr(one, name) == getattr(other, name), name
    assert [str(reject) for reject in one.rejects] == [str(reject) for reject in other.rejects]
    for part, same in ((one.train, other.train), (one.held_out, other.held_out)):
        for field in fields(Samples):
            if part is not None and field.name not in ("rows", "weights"):
                arrays = getattr(part, field.name), getattr(same, field.name)
                assert arrays[0] is arrays[1] is None or (
                    np.array_equal(*arrays) and arrays[0].dtype == arrays[1].dtype
                )


def test_several_processes_find_what_one_finds(tmp_path, both):
    left_out = {5: NO_TURNS, 2 * CHUNK: UNREADABLE, 2 * CHUNK + 9: TOO_LONG, 2 * CHUNK + 1: NO_TURNS}
    path = write(tmp_path, left_out)
    here, beside = both(path, on_bad_row="skip", oversize="drop", eval=0.1)
    assert_same(here, beside)
    assert [reject.where for reject in beside.rejects] == [
        f"rows.jsonl:{at + 1}" for at in (5, 2 * CHUNK, 2 * CHUNK + 1)
    ]
    greeted = sum(at % 9 == 0 and at not in left_out for at in range(ROWS))
    assert (beside.oversize, beside.notices["first turn was the assistant's and was dropped"]) == (1, greeted)
    caches = [next((tmp_path / f"cache-{workers}").glob("lengths-*/index")).read_bytes() for workers in (0, WORKERS)]
    assert caches[0] == caches[1]


def test_every_fault_comes_in_the_rows_order(tmp_path, both):
    path = write(tmp_path, {7: TOO_LONG, 8: UNREADABLE, 9: NO_TURNS, CHUNK + 3: UNREADABLE, 3 * CHUNK: TOO_LONG})
    here, beside = both(path, every_fault=True)
    assert_same(here, beside)
    assert [reject.where for reject in beside.rejects] == [
        f"rows.jsonl:{at + 1}" for at in (7, 8, 9, CHUNK + 3, 3 * CHUNK)
    ]
    assert [type(reject) for reject in beside.rejects[:3]] == [FitError, SampleError, SampleError]


@pytest.mark.parametrize("workers", [0, WORKERS])
def test_the_first_bad_row_is_the_error(tmp_path, workers):
    """Also where a later one is found sooner, as it takes no measuring."""
    path = write(tmp_path, {CHUNK - 3: UNREADABLE, CHUNK + 3: NO_TURNS})
    made = recipe(data=path)
    with pytest.raises(SampleError, match=f"^rows.jsonl:{CHUNK - 2} "):
        prepare(made.data, made.packing, by_size(), workers=workers)


@pytest.mark.parametrize("problem", ["single_label", "regression"])
def test_labels_come_in_the_rows_order(tmp_path, both, problem):
    labels = {"single_label": lambda at: "bca"[at % 3], "regression": lambda at: {"b": at / 3, "a": at}}[problem]
    rows = [{"id": str(at), "images": [], "prompt": f"Hi {at}", "labels": labels(at)} for at in range(ROWS)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    here, beside = both(path, by_size(score=Score()), HeadRecipe(problem=problem))
    assert_same(here, beside)
    if problem == "regression":
        assert beside.labels.names == ("b", "a") and beside.train.targets.dtype == np.float32
        assert beside.train.targets.tolist() == [[np.float32(at / 3), at] for at in range(ROWS)]
    else:
        assert beside.labels.names == ("a", "b", "c") and beside.train.targets.dtype == np.int64
        assert beside.train.targets.tolist() == [(1, 2, 0)[at % 3] for at in range(ROWS)]


def test_tables_are_read_by_several_processes(tmp_path, both):
    rows = [{"id": str(at), "messages": chat(f"Hi {at}", "Ho")["messages"]} for at in range(ROWS)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert_same(*both(str(tmp_path / "rows.parquet")))


def test_random_numbers_do_not_depend_on_who_reads(tmp_path):
    made = recipe(data=write(tmp_path))
    before = torch.get_rng_state()
    prepare(made.data, made.packing, by_size(), workers=WORKERS)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota_is_its_cores(tmp_path, files, found):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_of(tmp_path) == found


def test_few_rows_are_read_by_one_process_and_many_by_as_many_as_there_are_cores():
    here = cores()
    assert workers_for(2 * ROWS_EACH - 1) == 0
    assert workers_for(2 * ROWS_EACH) == (2 if here > 1 else 0)
    assert workers_for(MOST_WORKERS * ROWS_EACH) == (min(here, MOST_WORKERS) if here > 1 else 0)


def dying(times: int, folder: Path):
    """An encoder that kills the process that measures a picture, unless that is this one, so many times."""
    encoder, here = by_size(), os.getpid()

    def patches(size):
        deaths = len(list(folder.glob("death-*")))
        if os.getpid() != here and deaths < times:
            (folder / f"death-{deaths}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return encoder.vision.patches(size)

    return replace(encoder, vision=replace(encoder.vision, patches=patches))


def test_a_process_that_dies_is_begun_anew(tmp_path, both, caplog, deaths_seen_soon):
    here, beside = both(write(tmp_path), dying(1, tmp_path))
    assert_same(here, beside)
    assert re.search(r"a process that reads rows died at rows.jsonl:\d+ or behind it; it is begun anew", caplog.text)


def test_processes_that_die_again_and_again_are_an_error(tmp_path, deaths_seen_soon):
    made = recipe(data=write(tmp_path))
    with pytest.raises(DataError, match=r"4 processes that read rows died, the last at rows.jsonl:1 or behind it"):
        prepare(made.data, made.packing, dying(99, tmp_path), workers=WORKERS)


INTERRUPTED = """
import sys, time
from helpers import by_size, recipe
from mantis_lite.data.prepare import prepare
from dataclasses import replace

made, encoder = recipe(data=sys.argv[1]), by_size()
def patches(size):
    print("measuring", flush=True)
    time.sleep(0.2)
    return encoder.vision.patches(size)
prepare(made.data, made.packing, replace(encoder, vision=replace(encoder.vision, patches=patches)), workers=2)
"""


@pytest.mark.slow  # torch is loaded, and looks for the dead every 5 s
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whoever_ends_the_run_ends_its_processes(tmp_path, number):
    """Ctrl-C goes to all of them, and only one says so; a kill reaches one, and the others follow."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    command = [sys.executable, "-c", INTERRUPTED, write(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as run:
        assert run.stdout.readline().startswith("measuring")
        beside = psutil.Process(run.pid).children()
        (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
        _, said = run.communicate(timeout=60)
    assert len(beside) == 2 and not psutil.wait_procs(beside, timeout=30)[1]
    assert run.returncode == -number
    assert said.count("Traceback") == (number == signal.SIGINT), said
