"""The index of lengths: what was measured before a kill is not measured again, whoever else writes to it."""

import json
import logging
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import by_size, chat, recipe

from mantis_lite.data import lengths
from mantis_lite.data.chunks import CHUNK
from mantis_lite.data.encode import Encoder
from mantis_lite.data.lengths import RECORD, LengthCache, Measured, cache_dir, read_records, records_of
from mantis_lite.data.prepare import Prepared, prepare

FORK = multiprocessing.get_context("fork")


def lengths_by_key(count: int, seed: int = 0) -> dict[bytes, Measured]:
    random = np.random.default_rng(seed)
    return {random.bytes(16): Measured(*random.integers(0, 1 << 31, 4).tolist()) for _ in range(count)}


def remember(found: dict[bytes, Measured]) -> None:
    with LengthCache("x") as cache:
        cache.add(records_of(found))


def assert_remembered(found: dict[bytes, Measured]) -> None:
    assert LengthCache("x").find(list(found)) == list(found.values())


def parts() -> set[str]:
    return {part.name for part in next(cache_dir().glob("lengths-*")).iterdir()}


def test_what_was_put_in_is_found_and_nothing_else():
    extremes = {
        bytes(16): Measured(1, 2, 3, 4),
        b"\xff" * 16: Measured(5, 6, 7, 8),
        bytes(8) + b"\1" * 8: Measured(9, 0, 0),
    }
    found = lengths_by_key(1000) | extremes
    assert LengthCache("x").find(list(found)) == [None] * len(found)
    remember(found)
    assert_remembered(found)
    assert LengthCache("x").find([]) == []
    near = [key[:15] + bytes([key[15] ^ 1]) for key in found]
    assert LengthCache("x").find(near) == [None] * len(near)
    assert LengthCache("y").find(list(found)) == [None] * len(found)  # another encoder's


def test_the_index_is_in_order_and_has_each_key_once_in_whatever_stretches(monkeypatch):
    monkeypatch.setattr(lengths, "STRETCH", 50)
    first, second = lengths_by_key(400), lengths_by_key(300, seed=1)
    remember(first)
    again = dict(list(first.items())[:200])
    remember(second | again)
    (file,) = cache_dir().glob("lengths-x/index")
    records = read_records(file)
    keys = [tuple(key) for key in records["key"].tolist()]
    assert keys == sorted(set(keys)) and len(records) == 700 and file.stat().st_size == 700 * RECORD.itemsize
    assert_remembered(first | second)


def held(found: dict[bytes, Measured], ready, until) -> None:
    with LengthCache("x") as cache:
        cache.add(records_of(found))
        ready.set()
        until.wait()


@pytest.mark.parametrize("killed", [False, True])
def test_a_piece_is_its_writers_as_long_as_that_lives(killed):
    found, mine = lengths_by_key(10), lengths_by_key(10, seed=1)
    ready, until = FORK.Event(), FORK.Event()
    writer = FORK.Process(target=held, args=(found, ready, until))
    writer.start()
    ready.wait()
    remember(mine)
    assert LengthCache("x").find(list(found)) == [None] * 10 and len(parts()) == 3
    writer.kill() if killed else until.set()
    writer.join()
    assert_remembered(found | mine)
    assert parts() == {"index", "lock"}


def test_many_processes_write_at_once_and_nothing_is_lost():
    share = [lengths_by_key(50, seed) for seed in range(12)]
    writers = [FORK.Process(target=remember, args=(found,)) for found in share]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 12
    for found in share:
        assert_remembered(found)
    assert parts() == {"index", "lock"}


def test_half_a_record_is_dropped():
    found = lengths_by_key(10)
    folder = cache_dir() / "lengths-x"
    folder.mkdir(parents=True)
    content = records_of(found).tobytes()
    (folder / "0.piece").write_bytes(content[:-7])
    (folder / "1.piece").touch()
    (folder / "index.tmp-1-2").write_bytes(content)  # of one killed while it wrote the index
    last = list(found)[-1]
    assert LengthCache("x").find(list(found)) == [*list(found.values())[:-1], None]
    assert parts() == {"index", "lock"}
    remember({last: found[last]})
    assert_remembered(found)


# Whole data, prepared by processes that are killed.

ROWS = 40 * CHUNK


def text_rows(path: Path) -> str:
    path.write_text("".join(json.dumps(chat(f"Hi {at}", "Ho")) + "\n" for at in range(ROWS)))
    return str(path)


class Counting(Encoder):
    """Writes a line of how many rows it is asked to measure into the file `counts`."""

    counts: Path

    def begin_measure(self, samples, pool):
        with self.counts.open("a") as file:
            file.write(f"{len(samples)}\n")
        return super().begin_measure(samples, pool)


def ready(path: str, counts: Path, workers: int = 0) -> Prepared:
    made, encoder = recipe(data=path), by_size()
    counting = Counting(encoder.tokenizer, encoder.template, encoder.vision)
    object.__setattr__(counting, "counts", counts)
    counts.touch()
    return prepare(made.data, made.packing, counting, workers=workers)


def counted(file: Path) -> int:
    return sum(map(int, file.read_text().split()))


def written() -> int:
    """Rows in pieces and in the index."""
    files = [*cache_dir().glob("lengths-*/*.piece"), *cache_dir().glob("lengths-*/index")]
    return sum(file.stat().st_size for file in files if file.exists()) // RECORD.itemsize


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_again_and_again_measures_nothing_twice(tmp_path, monkeypatch, workers):
    path = text_rows(tmp_path / "rows.jsonl")
    kills = 3
    for kill in range(kills):
        goal = (kill + 1) * ROWS // 5
        run = FORK.Process(target=ready, args=(path, tmp_path / "counts", workers))
        run.start()
        while written() < goal:
            assert run.is_alive()
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGKILL)
        run.join()
        assert run.exitcode == -signal.SIGKILL and goal <= written() < ROWS
    found = ready(path, tmp_path / "counts", workers)
    on_the_way = CHUNK * (1 + 3 * workers if workers else 3)  # of each run that was killed: not yet written
    assert ROWS <= counted(tmp_path / "counts") <= ROWS + kills * on_the_way
    assert written() == ROWS and parts() == {"index", "lock"}
    ready(path, tmp_path / "none", workers)
    assert counted(tmp_path / "none") == 0
    monkeypatch.setenv("MANTIS_LITE_CACHE", str(tmp_path / "other"))
    straight = ready(path, tmp_path / "straight")
    for name in ("row", "lengths", "images", "digest"):
        assert np.array_equal(getattr(found.train, name), getattr(straight.train, name)), name


def test_what_was_measured_before_an_error_is_remembered(tmp_path):
    path = Path(text_rows(tmp_path / "rows.jsonl"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], "{}\n"]))
    with pytest.raises(ValueError, match=f"^rows.jsonl:{ROWS}"):
        ready(str(path), tmp_path / "first")
    path.write_text("".join(lines))
    ready(str(path), tmp_path / "second")
    assert (counted(tmp_path / "first"), counted(tmp_path / "second")) == (ROWS - 1, 1)


def on_a_small_disk(path: str, counts: Path, answers) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("mantis_lite").addHandler(handler)
    room = 2 * CHUNK * RECORD.itemsize + 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    answers.put((ready(path, counts).train.lengths.tolist(), said))


def test_a_full_disk_is_only_a_warning(tmp_path):
    path = text_rows(tmp_path / "rows.jsonl")
    answers = FORK.Queue()
    run = FORK.Process(target=on_a_small_disk, args=(path, tmp_path / "counts", answers))
    run.start()
    found, said = answers.get()
    run.join()
    (folder,) = cache_dir().glob("lengths-*")
    assert said == [f"lengths are not remembered: {folder} cannot be written: File too large"]
    again = ready(path, tmp_path / "again").train
    assert again.lengths.tolist() == found
    assert ROWS - 3 * CHUNK < counted(tmp_path / "again") < ROWS  # what had room is known
    ready(path, tmp_path / "none")
    assert counted(tmp_path / "none") == 0 and parts() == {"index", "lock"}
