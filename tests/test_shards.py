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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from clips_made import make
from helpers import chat, losses, picture, recipe, write_rows
from test_resume import curve_of, trained, weights_of

from benchmarks.forks import Forks
from mantis_lite.cli import app
from mantis_lite.data import place as places
from mantis_lite.data.dataset import pack_epoch
from mantis_lite.data.place import Place
from mantis_lite.data.prepare import prepare
from mantis_lite.data.shard_cache import File, ShardCache
from mantis_lite.data.windows import count_windows, fetched_sets, window_of
from mantis_lite.errors import DataError, RecipeError, SampleError
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import stated_head
from mantis_lite.sharding import shard
from mantis_lite.training.run import train

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
        lines[7]["labels"] = {"fast": 0.1, "good": 2}  # the order of the first row counts, and not of the first shard
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
    done = shard(made, str(tmp_path / "shards"), layout=layout, shard_size=8000)
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
    content = content_of(shards)
    names = [name for name in sorted(content) if name.endswith(".tar")]
    wheres = [
        json.loads(tar_members(shards / name)[member])["where"]
        for name in names
        for member in tar_members(shards / name)
        if member.endswith(".json")
    ]
    path = Path(rows).with_name("ordered.jsonl")
    path.write_text("\n".join(lines[int(where.rpartition(":")[2]) - 1] for where in wheres) + "\n")
    return str(path)


def tar_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.mark.parametrize("task", TASKS)
def test_training_on_shards_is_training_on_the_rows(llava_folder, tmp_path, task):
    rows = rows_of(task, tmp_path)
    shard(recipe_of(task, llava_folder, rows), str(tmp_path / "shards"), shard_size=8000)
    for name, data in (("rows", in_order_of(tmp_path / "shards", rows)), ("shards", str(tmp_path / "shards"))):
        train(recipe_of(task, llava_folder, data, run_dir=str(tmp_path / name)))
    assert len(losses(tmp_path / "rows")) > 4
    assert curve_of(tmp_path / "shards") == curve_of(tmp_path / "rows")
    assert weights_of(tmp_path / "shards") == weights_of(tmp_path / "rows")
