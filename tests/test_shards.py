"""Rows that are written into shards, by whatever engine, train as the rows they were."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from clips_made import make
from filelock import FileLock
from helpers import TEMPLATES, chat, losses, recipe, train, write_rows
from test_resume import curve_of, trained, weights_of
from typer.testing import CliRunner

from benchmarks.forks import Forks
from mantis_lite.cli import app
from mantis_lite.data import place as places
from mantis_lite.data.place import Place
from mantis_lite.data.prepare import prepare
from mantis_lite.data.schedule import pack_epoch, schedule
from mantis_lite.data.shard_cache import ROOM, File, ShardCache
from mantis_lite.data.windows import count_windows, fetched_sets, window_of
from mantis_lite.errors import DataError, RecipeError, SampleError
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.head_config import stated_head
from mantis_lite.recipe_file import save_recipe
from mantis_lite.sharding import shard
from mantis_lite.training.callbacks import Ahead

ROWS = 24


def rows_of(task: str, folder: Path, rows: int = ROWS) -> str:
    """Rows of a task, no two alike, their media beside them."""
    path = folder / "rows.jsonl"
    if task == "video":
        clips = [make(folder / f"{n}.mp4", frames=12, size=(64 + 32 * n, 64)) for n in range(3)]
        lines = [
            {"video": clips[i % 3].name, "messages": chat(f"<video> {i}?", f"it is {i}")["messages"]}
            for i in range(rows)
        ]
    elif task == "classify":
        lines = [
            {"images": [], "prompt": f"How good is number {i}?", "labels": {"good": i % 3, "fast": i / 7}}
            for i in range(rows)
        ]
        for line in lines[1:]:  # the order of the first row counts, and not of a shard's first
            line["labels"] = {"fast": line["labels"]["fast"], "good": line["labels"]["good"]}
    else:
        pictures = [(), (1,), (2, 3)]
        made = [
            chat(f"what is number {i}?" + " and" * (i % 5), f"number {i} is red", images=pictures[i % 3], id=f"n{i}")
            for i in range(rows)
        ]
        return write_rows(path, made)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


def recipe_of(task: str, model, data, **more):
    settings = {
        "train": {"learning_rate": 0.02, "samples_per_step": 4, "save_steps": 1, "seed": 3, "num_train_epochs": 2}
    }
    if task == "video":
        settings |= {"task": "video", "media": {"num_frames": 2}}
    elif task == "classify":
        settings |= {"task": "classify", "head": {"problem": "regression"}}
    return recipe(model, data=data, packing={"max_length": 256}, lora={"dropout": 0.2}, **(settings | more))


def samples_of(made):
    """What a recipe trains on, and the encoder of its model."""
    checkpoint = open_checkpoint(made.model)
    encoder = checkpoint.encoder(made)
    head = stated_head(checkpoint, made)
    return prepare(made.data, made.packing, encoder, task=made.task, head=head), encoder


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def same(one, other) -> bool:
    """Whether two samples have the same tensors, bit by bit."""
    arrays = [(one.input_ids, other.input_ids), (one.labels, other.labels), (one.positions, other.positions)]
    for a, b in zip(one.pixels, other.pixels, strict=True):
        assert a.keys() == b.keys()
        arrays += [(np.asarray(a[name]), np.asarray(b[name])) for name in a]
    return list(one.spans) == list(other.spans) and all(
        (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)) for a, b in arrays
    )


TASKS = ("chat", "video", "classify")


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
@pytest.mark.parametrize("task", TASKS)
def test_rows_of_shards_are_the_rows_they_were_made_of(llava_folder, tmp_path, task, layout):
    made = recipe_of(task, llava_folder, rows_of(task, tmp_path))
    done = shard(made, str(tmp_path / "shards"), layout=layout, shard_size=4000)
    assert done.manifest["rows"] == ROWS and len(done.manifest["shards"]) > 1
    before, encoder = samples_of(made)
    after, _ = samples_of(recipe_of(task, llava_folder, str(tmp_path / "shards")))
    place = {sample.where: at for at, sample in enumerate(before.train)}
    order = np.array([place[sample.where] for sample in after.train])
    assert sorted(order) == list(range(ROWS)) and list(order) != list(range(ROWS))
    expected = before.train.take(order)
    for name in ("lengths", "images", "digest"):
        assert np.array_equal(getattr(after.train, name), getattr(expected, name)), name
    assert after.labels == before.labels
    if task == "classify":
        assert np.array_equal(after.train.targets, expected.targets)
    for old, new in zip(expected, after.train, strict=True):
        assert new.written is not None and not new.videos and new.id == old.id
        assert same(encoder.encode(old), encoder.encode(new))


def test_rows_of_every_family_are_the_rows_they_were_made_of(family, folder_of, tmp_path):
    settings = {"packing": {"max_length": 4096}}
    made = recipe(folder_of(family), data=rows_of("chat", tmp_path, 6), **settings)
    shard(made, str(tmp_path / "shards"))
    before, encoder = samples_of(made)
    after, _ = samples_of(recipe(folder_of(family), data=str(tmp_path / "shards"), **settings))
    old = {sample.where: sample for sample in before.train}
    assert len(after.train) == 6
    for new in after.train:
        assert same(encoder.encode(old[new.where]), encoder.encode(new))


def in_order_of(shards: Path, rows: str) -> str:
    """A copy of a file of rows in the order of the shards that were made of it."""
    lines = Path(rows).read_text().splitlines()
    files = [tar_members(file) for file in sorted(shards.glob("*.tar"))]
    wheres = [json.loads(file[name])["where"] for file in files for name in file if name.endswith(".json")]
    path = Path(rows).with_name("ordered.jsonl")
    path.write_text("\n".join(lines[int(where.rpartition(":")[2]) - 1] for where in wheres) + "\n")
    return str(path)


def tar_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.mark.parametrize("task", ["chat", pytest.param("video", marks=pytest.mark.slow), "classify"])
def test_training_on_shards_is_training_on_the_rows(llava_folder, tmp_path, task):
    rows = rows_of(task, tmp_path)
    shard(recipe_of(task, llava_folder, rows), str(tmp_path / "shards"), shard_size=8000)
    stated = {"head": {"problem": "regression", "labels": ["good", "fast"]}} if task == "classify" else {}
    for name, data in (("rows", in_order_of(tmp_path / "shards", rows)), ("shards", str(tmp_path / "shards"))):
        train(recipe_of(task, llava_folder, data, run_dir=str(tmp_path / name), **stated))
    assert len(losses(tmp_path / "rows")) >= 4
    assert curve_of(tmp_path / "shards") == curve_of(tmp_path / "rows")
    assert weights_of(tmp_path / "shards") == weights_of(tmp_path / "rows")


def test_a_mixture_keeps_its_sources_weights_and_pictures_as_they_were(llava_folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    sources = [
        {"path": rows_of("chat", tmp_path / "one"), "weight": 2.0, "max_size": 9, "shuffle": True},
        {"path": rows_of("chat", tmp_path / "two", 6)},
    ]
    made = recipe_of("chat", llava_folder, {"sources": sources})
    shard(made, str(tmp_path / "shards"), shard_size=20_000)
    before, _ = samples_of(made)
    after, _ = samples_of(recipe_of("chat", llava_folder, str(tmp_path / "shards")))
    assert after.train.weights == before.train.weights == [2.0, 1.0]
    assert np.bincount(after.train.source).tolist() == [9, 6]
    assert {sample.where for sample in after.train} == {sample.where for sample in before.train}
    of_rows = {sample.where: [image.source.read_bytes() for image in sample.images] for sample in before.train}
    for sample in after.train:
        assert [image.source for image in sample.images] == of_rows[sample.where]
    half = recipe_of(
        "chat", llava_folder, {"sources": [{"path": str(tmp_path / "shards"), "weight": 0.5, "max_size": 8}]}
    )
    some, _ = samples_of(half)
    assert some.train.weights == [1.0, 0.5] and len(some.train) == 8 and some.notices["max_size"] == 15 + 7


def test_nothing_is_read_or_measured_before_it_is_trained_on(llava_folder, tmp_path, monkeypatch):
    made = recipe_of("classify", llava_folder, rows_of("classify", tmp_path))
    shard(made, str(tmp_path / "shards"), shard_size=8000)
    monkeypatch.setattr("mantis_lite.data.shards.Shards.sample", None)
    monkeypatch.setattr("mantis_lite.data.encode.Encoder.begin_measure", None)
    monkeypatch.setattr("mantis_lite.data.chunks.ROWS_EACH", 1)  # of rows to be read it would start processes
    monkeypatch.setattr("mantis_lite.data.chunks._loaded", None)
    found, _ = samples_of(recipe_of("classify", llava_folder, str(tmp_path / "shards")))
    assert len(found.train) == ROWS and len(pack_epoch(found.train, made.packing)) > 1


def test_the_webdataset_package_reads_them(llava_folder, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    shard(recipe_of("chat", llava_folder, rows_of("chat", tmp_path)), str(tmp_path / "shards"), shard_size=20_000)
    files = [str(file) for file in sorted((tmp_path / "shards").glob("*.tar"))]
    found = list(webdataset.WebDataset(files, shardshuffle=False).decode("pil"))
    assert [row["__key__"] for row in found] == [f"{number:09d}" for number in range(ROWS)]
    for row in found:
        shown = sum(part["type"] == "image" for turn in row["json"]["messages"] for part in turn["content"])
        assert sum(name.endswith(".png") for name in row) == shown
        assert len(row["npz"]["input_ids"]) == len(row["npz"]["labels"])


@pytest.mark.slow  # each imports torch
def test_processes_write_what_one_writes(llava_folder, tmp_path):
    made = recipe_of("video", llava_folder, rows_of("video", tmp_path))
    for workers in (1, 2):
        shard(made, str(tmp_path / f"by-{workers}"), shard_size=8000, workers=workers)
    assert len(content_of(tmp_path / "by-1")) > 4
    assert content_of(tmp_path / "by-2") == content_of(tmp_path / "by-1")


@pytest.mark.slow
@pytest.mark.timeout(900)  # Ray starts processes of its own, which wait where a machine is busy
@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_ray_writes_what_processes_write(llava_folder, tmp_path, layout):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'mantis-lite[ray]'")
    made = recipe_of("chat", llava_folder, rows_of("chat", tmp_path))
    for engine in ("plain", "ray"):
        shard(made, str(tmp_path / engine), engine, layout, shard_size=20_000, workers=2)
    assert len(content_of(tmp_path / "plain")) > 4
    assert content_of(tmp_path / "ray") == content_of(tmp_path / "plain")


def test_ray_that_is_not_there_is_named(llava_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    made = recipe_of("chat", llava_folder, rows_of("chat", tmp_path))
    with pytest.raises(RecipeError, match=r"--engine: ray is not installed\n  pip install 'mantis-lite\[ray\]'"):
        shard(made, str(tmp_path / "shards"), "ray")


PREPARE = """
import sys
from mantis_lite.recipe_file import load_recipe
from mantis_lite.sharding import shard
from mantis_lite.training.callbacks import Ahead
if __name__ == "__main__":
    shard(load_recipe(sys.argv[1]), sys.argv[2], shard_size=4000, workers=int(sys.argv[3]))
"""


@pytest.mark.slow
def test_what_was_killed_goes_on_and_writes_the_same(llava_folder, tmp_path):
    made = recipe_of("chat", llava_folder, rows_of("chat", tmp_path, 60))
    save_recipe(made, tmp_path / "recipe.yaml")
    (tmp_path / "prepare.py").write_text(PREPARE)
    command = [sys.executable, str(tmp_path / "prepare.py"), str(tmp_path / "recipe.yaml")]
    killed = tmp_path / "killed"
    for workers, at in (("1", 3), ("2", 12)):
        process = subprocess.Popen([*command, str(killed), workers])
        while process.poll() is None and len(list(killed.glob("*.tar"))) < at:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (killed / "shards.json").exists()
    there = {file.name: file.stat().st_mtime_ns for file in killed.glob("*.tar")}
    with pytest.raises(DataError, match="shards that are not all written"):
        samples_of(recipe_of("chat", llava_folder, str(killed)))
    for folder in (killed, tmp_path / "straight"):
        shard(made, str(folder), shard_size=4000)
    assert content_of(killed) == content_of(tmp_path / "straight")
    assert len(there) >= 12 and all((killed / name).stat().st_mtime_ns == time for name, time in there.items())


def http() -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'mantis-lite[http]'")


@contextmanager
def served(folder: Path, fails: int = 0):
    """A folder over HTTP on loopback, the first so many requests answered by an error; and what was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            return self.send_error(503) if len(asked) <= fails else super().do_GET()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(places, "PAUSES", (0, 0, 0))


def sharded(llava_folder, tmp_path, rows: int = ROWS) -> tuple[Path, dict]:
    """Shards of chat rows of 20 kB each."""
    made = recipe_of("chat", llava_folder, rows_of("chat", tmp_path, rows))
    return tmp_path / "shards", shard(made, str(tmp_path / "shards"), shard_size=20_000).manifest


def of_url(llava_folder, url: str, cache_size: int, **more):
    return recipe_of("chat", llava_folder, {"sources": url, "cache_size": cache_size}, **more)


def test_an_epoch_of_what_is_fetched_goes_through_windows_that_fit(llava_folder, tmp_path):
    http()
    folder, manifest = sharded(llava_folder, tmp_path, 60)
    largest = max(file["bytes"] for file in manifest["shards"])
    (tmp_path / "more").mkdir()
    with served(folder) as (url, asked):
        data = {"sources": [url, rows_of("chat", tmp_path / "more")], "cache_size": 5 * largest}
        made = recipe_of("chat", llava_folder, data)
        found, _ = samples_of(made)
        assert {path.rpartition("/")[2] for path in asked} == {"shards.json", "index.parquet"}
    sets = fetched_sets(found.train)
    count, window = count_windows(sets), window_of(found.train)
    assert count > 3 and sets[0].bytes_of_windows(count).max() <= 2.5 * largest
    assert sets[0].bytes_of_windows(count - 1).max() > 2.5 * largest
    for source in (0, 1):  # each window has its part of what lies here as well
        assert (np.bincount(window[found.train.source == source], minlength=count) > 0).all()
    epochs = [pack_epoch(found.train, made.packing, epoch) for epoch in range(2)]
    for packs in epochs:
        assert sorted(index for pack in packs for index in pack) == list(range(len(found.train)))
        of_packs = [window[pack].tolist() for pack in packs]
        assert all(len(set(of)) == 1 for of in of_packs)
        assert np.count_nonzero(np.diff([of[0] for of in of_packs])) == count - 1
    assert epochs[0] != epochs[1]
    with served(folder) as (url, _):
        found, _ = samples_of(of_url(llava_folder, url, largest))
        with pytest.raises(
            DataError,
            match=rf"data.cache_size: {largest:,} bytes do not hold two [^\n]*\n  Raise it to {2 * largest:,}",
        ):
            pack_epoch(found.train, made.packing)


def test_the_next_window_is_fetched_while_one_is_trained_on(llava_folder, tmp_path):
    http()
    folder, manifest = sharded(llava_folder, tmp_path, 60)
    with served(folder) as (url, asked):
        made = of_url(llava_folder, url, 5 * max(file["bytes"] for file in manifest["shards"]))
        samples = samples_of(made)[0].train
        plan = schedule(samples, made.packing, made.train)
        ahead, (shards,) = Ahead(plan, samples), fetched_sets(samples)
        count, fetched = len(set(window_of(samples))), 0
        visited = [window for _, window in ahead.visits]
        assert sorted(visited[:count]) == sorted(visited[count:]) == list(range(count))
        for step in range(plan.steps):
            asked.clear()
            ahead.on_step_begin(None, SimpleNamespace(global_step=step), None)
            if threads := [thread for thread in threading.enumerate() if thread.name == "shards ahead"]:
                threads[0].join()
                fetched += 1
                at = max(n for n, (first, _) in enumerate(ahead.visits) if first <= step * plan.per_step)
                wanted = {
                    file.name for n, file in enumerate(shards.files) if shards.window(n, count) == visited[at + 1]
                }
                assert {path[1:] for path in asked} <= wanted
                cached = {path.name.partition("-")[2] for path in shards.cache.folder.iterdir()}
                assert wanted <= cached
        assert fetched >= count
    assert not Ahead(plan, samples_of(recipe_of("chat", llava_folder, str(folder)))[0].train).visits


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_while_it_streams_is_the_run_that_was_not(llava_folder, tmp_path, workers):
    http()
    folder, manifest = sharded(llava_folder, tmp_path, 40)
    limit = 4 * max(file["bytes"] for file in manifest["shards"])
    assert limit < manifest["bytes"] / 2
    with served(folder) as (url, asked), Forks() as forks:
        more = {"train": {"learning_rate": 0.02, "samples_per_step": 4, "save_steps": 1, "num_train_epochs": 2}}
        more["train"]["dataloader_num_workers"] = workers
        settings = of_url(llava_folder, url, limit, **more).model_dump(mode="json", exclude_defaults=True)

        def run(name: str, **job) -> dict:
            environment = {"MANTIS_LITE_CACHE": str(tmp_path / f"cache-{name}")}
            return trained(forks, settings, tmp_path / name, environment=environment, **job)

        straight = run("straight")
        assert straight["status"] == 0, straight["said"]
        for step in (4, 11):
            killed = run("killed", kill_at=step, saved=step == 4)
            assert killed["status"] == -signal.SIGKILL, killed["said"]
        resumed = run("killed")
        assert resumed["status"] == 0 and "goes on from checkpoint-1" in resumed["said"], resumed["said"]
    assert curve_of(tmp_path / "killed") == curve_of(tmp_path / "straight")
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "straight")
    cached = sum(file.stat().st_size for file in (tmp_path / "cache-straight" / "shards").iterdir())
    assert 0 < cached <= limit
    fetched = [path for path in asked if path.endswith(".tar")]
    assert len(fetched) > 2 * len(manifest["shards"])  # the second epoch finds the first's gone


@pytest.mark.slow
def test_shards_in_memory_are_trained_on_as_those_on_disk(llava_folder, tmp_path):
    rows = rows_of("chat", tmp_path)
    urls = [str(tmp_path / "shards"), f"file://{tmp_path}/again", f"memory://{tmp_path.name}"]
    for n, url in enumerate(urls):
        manifest = shard(recipe_of("chat", llava_folder, rows), url, shard_size=20_000).manifest
        train(of_url(llava_folder, url, 2 * manifest["bytes"], run_dir=str(tmp_path / f"run-{n}")))  # one window
    assert curve_of(tmp_path / "run-1") == curve_of(tmp_path / "run-0")
    assert curve_of(tmp_path / "run-2") == curve_of(tmp_path / "run-0")
    assert shard(recipe_of("chat", llava_folder, rows), urls[2], shard_size=20_000).manifest == manifest


def test_what_fails_on_its_way_is_tried_again_and_then_named(llava_folder, tmp_path, no_pauses):
    http()
    folder, _ = sharded(llava_folder, tmp_path)
    with served(folder, fails=3) as (url, asked):
        found, encoder = samples_of(of_url(llava_folder, url, 10**9))
        assert encoder.encode(found.train[0]).labels.any() and len(asked) == 6
    with served(folder, fails=99) as (url, _), pytest.raises(DataError, match=rf"{url}/shards.json: 503.*\n  Look at"):
        samples_of(of_url(llava_folder, url, 10**9))
    with pytest.raises(DataError, match=rf"{url}/shards.json: .*[Cc]onnect.*"):  # nobody is there any more
        samples_of(of_url(llava_folder, url, 10**9))


def damage(file: Path, at: int = -2000) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_damaged_row_is_found_on_disk(llava_folder, tmp_path, layout):
    made = recipe_of("chat", llava_folder, rows_of("chat", tmp_path))
    shard(made, str(tmp_path / "shards"), layout=layout)
    (file,) = [file for file in (tmp_path / "shards").iterdir() if file.name.startswith("000000")]
    damage(file, len(file.read_bytes()) // 2)
    found, encoder = samples_of(recipe_of("chat", llava_folder, str(tmp_path / "shards")))
    told = []
    for at in range(ROWS):
        try:
            encoder.encode(found.train[at])
        except SampleError as error:
            told.append(str(error))
    assert len(told) == (1 if layout == "webdataset" else ROWS)  # all of a group, which is read at once
    assert "its bytes in" in told[0] and f"{file.name} are not as they were written" in told[0]
    if layout == "webdataset":
        with pytest.raises(SampleError, match="its bytes in"):
            train(recipe_of("chat", llava_folder, str(tmp_path / "shards"), run_dir=str(tmp_path / "run")))


def test_a_damaged_shard_is_found_when_it_is_fetched(llava_folder, tmp_path, no_pauses):
    http()
    folder, _ = sharded(llava_folder, tmp_path)
    damage(folder / "000000.tar")
    (folder / "000001.tar").unlink()
    with served(folder) as (url, asked):
        found, _ = samples_of(of_url(llava_folder, url, 10**9))
        shards = found.train.rows[0].of("shard")
        with pytest.raises(DataError, match=r"000000.tar: its bytes are not those that were written there"):
            found.train[int(np.flatnonzero(shards == 0)[0])]
        assert asked.count("/000000.tar") == 4
        with pytest.raises(DataError, match=r"no 000001.tar, which its shards.json names"):
            found.train[int(np.flatnonzero(shards == 1)[0])]
        found.train[int(np.flatnonzero(shards == 2)[0])]


def use_cache(url: str, files: list[File], folder: str, limit: int, seed: int) -> int:
    """Read files in a random order through a cache; returns the most bytes that were seen in it."""
    cache, most = ShardCache(Path(folder), limit), 0
    for at in np.random.default_rng(seed).integers(0, len(files), 40):
        with cache.open(Place(url), files[at]) as opened:
            assert sha256(opened.read()).hexdigest() == files[at].sha256
        with FileLock(Path(folder) / ROOM):  # nothing comes or goes while its bytes are counted
            sizes = [file.stat().st_size for file in os.scandir(folder) if not file.name.endswith(".lock")]
        most = max(most, sum(sizes))
    return most


@pytest.mark.slow
def test_processes_share_a_cache_that_stays_within_its_limit(tmp_path):
    http()
    (tmp_path / "files").mkdir()
    files = []
    for n in range(12):
        content = os.urandom(100_000 + n)
        (tmp_path / "files" / f"{n}.tar").write_bytes(content)
        files.append(File(f"{n}.tar", len(content), sha256(content).hexdigest()))
    with served(tmp_path / "files") as (url, _):
        task = partial(use_cache, url, files, str(tmp_path / "cache"), 500_000)
        with ProcessPoolExecutor(4, get_context("spawn")) as pool:
            most = max(pool.map(task, range(4)))
    assert 300_000 < most <= 500_000
    left = {file.name for file in (tmp_path / "cache").iterdir() if not file.name.endswith(".lock")}
    assert left and all(name.endswith(".tar") for name in left)


def test_room_that_a_killed_process_reserved_is_taken_back(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.tar").write_bytes(b"a" * 100)
    file = File("a.tar", 100, sha256(b"a" * 100).hexdigest())
    cache = ShardCache(tmp_path / "cache", 150)
    cache.folder.mkdir()
    (cache.folder / "of-one-that-was-killed.tar.120.part").touch()
    (cache.folder / f"{file.sha256[:32]}-a.tar.100.part").touch()  # and of the same file
    system = fsspec.filesystem("memory")
    system.pipe_file(f"/{tmp_path.name}/a.tar", b"a" * 100)
    with cache.open(Place(f"memory://{tmp_path.name}"), file) as opened:
        assert opened.read() == b"a" * 100
    assert not list(cache.folder.glob("*.part"))
    large = File("b.tar", 200, "0" * 64)
    with pytest.raises(DataError, match=r"data.cache_size: 150 bytes, and b.tar of memory://.* has 200 bytes"):
        cache.fetch(Place(f"memory://{tmp_path.name}"), large)


CHANGES = [
    ({"prompt": {"template": "mllava_v1"}}, "prompt.template"),
    ({"prompt": {"system": "Be brief."}}, "prompt.system"),
    ({"media": {"max_image_size": 32}}, "media.max_image_size, media"),
    ({"prompt": {"labels": "upstream"}}, "prompt.labels"),
]


@pytest.mark.parametrize(("changed", "named"), CHANGES, ids=[named for _, named in CHANGES])
def test_shards_of_another_encoder_are_refused(llava_folder, tmp_path, changed, named):
    folder, _ = sharded(llava_folder, tmp_path, 6)
    other = recipe_of("chat", llava_folder, str(folder), **changed)
    told = f"made with another {named}: task chat, model .*, prompt.template llama_3.*\n  Set it as it was, or prepare"
    with pytest.raises(DataError, match=told):
        prepare(other.data, other.packing, by_settings(llava_folder, other), task=other.task)


def by_settings(llava_folder, made):
    """The encoder of a recipe; of a template whose tokens the model lacks, as far as that can be."""
    checkpoint = open_checkpoint(made.model)
    if made.prompt.template == "mllava_v1":
        return replace(checkpoint.encoder(recipe(llava_folder)), template=TEMPLATES["mllava_v1"])
    return checkpoint.encoder(made)


def test_shards_of_another_task_or_model_are_refused(folder_of, tmp_path):
    folder, _ = sharded(folder_of("llava"), tmp_path, 6)
    with pytest.raises(DataError, match=r"made with another task, media.*: task chat"):
        samples_of(recipe_of("video", folder_of("llava"), str(folder)))
    with pytest.raises(DataError, match=r"made with another model's tokenizer, .*model's pictures"):
        samples_of(recipe_of("chat", folder_of("idefics2"), str(folder)))


def test_what_is_wrong_with_a_set_of_shards_is_told(llava_folder, tmp_path):
    folder, _ = sharded(llava_folder, tmp_path)
    good = (folder / "shards.json").read_text()

    def told(path: str, **source) -> str:
        with pytest.raises(DataError) as error:
            samples_of(recipe_of("chat", llava_folder, {"sources": [{"path": path, **source}]}))
        return str(error.value)

    assert "split has no effect on shards\n  Remove split." in told(str(folder), split="train")
    (folder / "shards.json").write_text(good.replace('"format": 1', '"format": 2'))
    assert "shards of format 2, and 1 is read here" in told(str(folder))
    (folder / "shards.json").write_text(good[:50])
    assert "shards.json: damaged" in told(str(folder))
    (folder / "shards.json").write_text(good)
    (folder / "000000.tar").write_bytes((folder / "000000.tar").read_bytes()[:-1])
    assert "000000.tar is" in told(str(folder)) and "of its" in told(str(folder))
    (folder / "000000.tar").unlink()
    assert "000000.tar is missing\n  Copy it there again" in told(str(folder))
    assert "no shards.json in it\n  Give a folder of shards." in told(f"memory://{tmp_path.name}/nothing")
    assert "nosuch://a/shards.json: Protocol not known: nosuch" in told("nosuch://a")
    if importlib.util.find_spec("s3fs") is None:
        assert "s3://bucket/a/shards.json: Install s3fs" in told("s3://bucket/a")


def test_a_folder_that_is_in_use_is_not_written_to(llava_folder, tmp_path):
    folder, manifest = sharded(llava_folder, tmp_path)
    made = recipe_of("chat", llava_folder, str(tmp_path / "rows.jsonl"))
    assert shard(made, str(folder), shard_size=20_000).manifest == manifest  # all is there
    with pytest.raises(DataError, match=r"--to: .*shards holds shards of other rows or settings"):
        shard(made, str(folder), shard_size=10_000)
    with pytest.raises(DataError, match=r"--to: .* has other files in it\n  Name a folder that is empty"):
        shard(made, str(tmp_path))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "plan.json").write_text('{"key": "other"}')
    with pytest.raises(DataError, match=r"--to: .*begun holds a part of other shards"):
        shard(made, str(tmp_path / "begun"))
    with pytest.raises(DataError, match="shards are made of rows, and not of other shards"):
        shard(recipe_of("chat", llava_folder, str(folder)), str(tmp_path / "again"))


def test_a_picture_that_breaks_is_an_error_or_counted(llava_folder, tmp_path):
    rows = rows_of("chat", tmp_path, 200)
    (tmp_path / "rows-4-0.png").write_bytes((tmp_path / "rows-4-0.png").read_bytes()[:200])  # its header is sound
    with pytest.raises(SampleError, match=r"rows.jsonl:5 \(id .n4.\): .*cannot be read"):
        shard(recipe_of("chat", llava_folder, rows), str(tmp_path / "error"), shard_size=20_000)
    skipping = {"sources": rows, "on_bad_row": "skip"}
    done = shard(recipe_of("chat", llava_folder, skipping), str(tmp_path / "skip"), shard_size=20_000)
    assert done.manifest["rejected"] == 1 and done.manifest["rows"] == 199 and done.rejects[0].sample_id == "n4"
    found, _ = samples_of(recipe_of("chat", llava_folder, str(tmp_path / "skip")))
    assert len(found.train) == 199 and found.notices["a row was rejected when the shards were made"] == 1
    for n in (7, 10):
        (tmp_path / f"rows-{n}-0.png").write_bytes(b"\x89PNG" + bytes(0))
    with pytest.raises(DataError, match="more than the 1% that may be"):
        shard(recipe_of("chat", llava_folder, skipping), str(tmp_path / "too-many"), shard_size=20_000)


def test_rows_that_are_larger_than_a_pack_are_told_of(llava_folder, tmp_path):
    data = {"sources": rows_of("chat", tmp_path), "oversize": "drop"}
    made = recipe_of("chat", llava_folder, data)
    most = int(np.median(samples_of(made)[0].train.lengths[:, 0]))
    small = made.model_copy(update={"packing": made.packing.model_copy(update={"max_length": most})})
    done = shard(small, str(tmp_path / "shards"))
    left = done.manifest["oversize"]
    assert 0 < left < ROWS
    found, _ = samples_of(recipe_of("chat", llava_folder, str(tmp_path / "shards")))
    assert found.notices[f"a row was left out of the shards as larger than packing.max_length={most}"] == left
    shard(made, str(tmp_path / "all"))
    of_all = recipe_of("chat", llava_folder, data | {"sources": str(tmp_path / "all")})
    found, _ = samples_of(of_all.model_copy(update={"packing": small.packing}))
    assert found.oversize == left and len(found.train) == ROWS - left


def test_the_command_says_what_it_wrote(llava_folder, tmp_path):
    rows = rows_of("chat", tmp_path, 6)
    words = ["data", "prepare", "chat", f"model={llava_folder}", f"data={rows}", "--to", str(tmp_path / "shards")]
    done = CliRunner().invoke(app, [*words, "--workers", "1", "--shard-size", "1MB"])
    assert done.exit_code == 0, done.output
    assert "6 rows, " in done.output and f"in 1 shards: data={tmp_path}/shards" in done.output.replace("\n", "")
    failed = CliRunner().invoke(app, [*words, "--shard-size", "many"])
    assert isinstance(failed.exception, RecipeError) and "--shard-size: expected a size" in str(failed.exception)
    with pytest.raises(RecipeError, match=r"data.cache_size: expected a size, as 512MB or 20GB, found 'much'"):
        recipe_of("chat", llava_folder, {"sources": rows, "cache_size": "much"})
