"""What one process prepared, another opens: the same, mapped, and without a row being read."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import by_size, chat, recipe, write_rows

from mantis_lite.data import source
from mantis_lite.data.encode import Score
from mantis_lite.data.prepare import Prepared, Samples, prepare
from mantis_lite.data.prepared_files import Mapped, open_prepared, save_prepared
from mantis_lite.errors import DataError, SampleError
from mantis_lite.recipe import HeadRecipe

ROWS = 150
KINDS = ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet", "saved"]


def write(folder: Path, kind: str) -> str:
    """Rows of text, two with pictures where their files can be named."""
    rows = [chat(f"Hi {at}", "Ho" * at, images=(1,) * (at in (3, 30)), id=str(at)) for at in range(ROWS)]
    path = Path(write_rows(folder / "rows.jsonl", rows))
    parsed = [json.loads(line) for line in path.read_text().splitlines()]
    if kind == "rows.json":
        (folder / kind).write_text(json.dumps(parsed))
    elif kind == "rows.jsonl.gz":
        (folder / kind).write_bytes(gzip.compress(path.read_bytes()))
    elif kind == "rows.parquet":
        datasets.Dataset.from_list(parsed).to_parquet(str(folder / kind))
    elif kind == "saved":
        datasets.Dataset.from_list(parsed).save_to_disk(str(folder / kind))
        parsed_pictures = [file.rename(folder / kind / file.name) for file in folder.glob("*.png")]
        assert len(parsed_pictures) == 2
    return str(folder / kind)


def asked(data, packing=None, **more) -> tuple:
    made = recipe(data=data, packing=packing or {"max_length": 10_000}, **more)
    return made.data, made.packing, by_size()


def words_of(samples: Samples) -> list:
    return [(sample.where, sample.id, sample.turns) for sample in samples]


def assert_same(one: Prepared, other: Prepared) -> None:
    for name in ("notices", "rows_read", "oversize", "labels", "made_by"):
        assert getattr(one, name) == getattr(other, name), name
    assert [(type(r), str(r)) for r in one.rejects] == [(type(r), str(r)) for r in other.rejects]
    assert (one.held_out is None) == (other.held_out is None)
    for part, same in ((one.train, other.train), (one.held_out, other.held_out)):
        if part is None:
            continue
        assert part.weights == same.weights and words_of(part) == words_of(same)
        for field in fields(Samples):
            before, now = getattr(part, field.name), getattr(same, field.name)
            if isinstance(before, np.ndarray):
                assert isinstance(now, Mapped) and before.dtype == now.dtype and np.array_equal(before, now), field.name
                assert not now.flags.writeable


@pytest.fixture
def unread(monkeypatch):
    """Opens where no row may be parsed, and no file searched for its rows."""

    def opened(*arguments, **more) -> Prepared:
        with monkeypatch.context() as patch:
            patch.setattr(source, "parse", None)
            patch.setattr(source, "Lines", None)
            return open_prepared(*arguments, **more)

    return opened


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_opened_is_what_was_prepared(tmp_path, unread, kind):
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    sources = [
        {"path": write(tmp_path, kind), "weight": 2.5, "shuffle": True, "max_size": 40},
        {"path": write_rows(tmp_path / "more.jsonl", [chat(), chat("Hi", "x" * 30_000), chat("Hi", "Ho")])},
    ]
    settings = {"sources": sources, "on_bad_row": "skip", "oversize": "drop", "eval": write(held_out, "rows.jsonl")}
    arguments = asked(settings)
    prepared = prepare(*arguments)
    assert (len(prepared.rejects), prepared.oversize, prepared.notices["max_size"]) == (1, 1, ROWS - 40)
    save_prepared(prepared, tmp_path / "run/prepared")
    assert_same(prepared, unread(tmp_path / "run/prepared", *arguments))


def test_a_share_that_is_held_out_and_labels(tmp_path, unread):
    rows = [{"id": str(at), "images": [], "prompt": f"Hi {at}", "labels": "ab"[at % 2]} for at in range(ROWS)]
    made = recipe(data={"sources": write_rows(tmp_path / "rows.jsonl", rows), "eval": 0.2})
    arguments = (made.data, made.packing, by_size(score=Score()), 7, "classify", HeadRecipe(problem="single_label"))
    prepared = prepare(*arguments)
    save_prepared(prepared, tmp_path / "prepared")
    opened = unread(tmp_path / "prepared", *arguments)
    assert_same(prepared, opened)
    assert opened.train.rows[0] is opened.held_out.rows[0] and opened.held_out.weights == [1.0]


def test_sources_of_one_name_keep_what_they_are_called(tmp_path, unread):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    arguments = asked([write(folder, "rows.jsonl") for folder in folders])
    prepared = prepare(*arguments)
    save_prepared(prepared, tmp_path / "prepared")
    assert_same(prepared, unread(tmp_path / "prepared", *arguments))
    assert prepared.train[0].where == f"{folders[0]}/rows.jsonl:1"


IN_ANOTHER_PROCESS = """
import pickle, sys
from helpers import by_size, recipe
from mantis_lite.data.prepared_files import open_prepared
from pathlib import Path

made = recipe(data=sys.argv[2], packing={"max_length": 10_000})
opened = open_prepared(Path(sys.argv[1]), made.data, made.packing, by_size()).train
copied = pickle.load(open(sys.argv[3], "rb"))
for samples in (opened, copied):
    print([(s.where, s.id, s.turns) for s in samples], samples.lengths.tolist(), samples.digest.tolist())
"""


@pytest.mark.slow  # torch is loaded
@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet"])
def test_another_process_opens_it_or_is_sent_a_short_pickle(tmp_path, kind):
    arguments = asked(write(tmp_path, kind))
    prepared = prepare(*arguments).train
    save_prepared(prepare(*arguments), tmp_path / "prepared")
    content = pickle.dumps(open_prepared(tmp_path / "prepared", *arguments).train)
    assert len(content) < 10_000
    (tmp_path / "pickle").write_bytes(content)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, tmp_path / "prepared", tmp_path / kind, tmp_path / "pickle"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = f"{words_of(prepared)} {prepared.lengths.tolist()} {prepared.digest.tolist()}"
    assert done.stdout.splitlines() == [expected, expected]


def test_a_pickle_of_a_part_has_its_numbers(tmp_path):
    arguments = asked(write(tmp_path, "rows.jsonl"))
    save_prepared(prepare(*arguments), tmp_path / "prepared")
    opened = open_prepared(tmp_path / "prepared", *arguments).train
    for part in (opened.row, opened.row[3:], opened.lengths[:, 0], opened.row[::-1], opened.row[:0]):
        copied = pickle.loads(pickle.dumps(part))
        assert np.array_equal(copied, part) and copied.dtype == part.dtype
    taken = opened.take(np.array([5, 2]))
    assert words_of(pickle.loads(pickle.dumps(taken))) == words_of(taken)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_has_changed_is_refused(tmp_path, kind):
    path = write(tmp_path, kind)
    arguments = asked(path)
    save_prepared(prepare(*arguments), tmp_path / "prepared")
    file = next(Path(path).glob("*.arrow")) if kind == "saved" else Path(path)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with pytest.raises(DataError, match=f"{path}: has changed since it was read\n  Start again"):
        open_prepared(tmp_path / "prepared", *arguments)


def test_a_source_that_is_gone_is_refused(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    arguments = asked(path)
    save_prepared(prepare(*arguments), tmp_path / "prepared")
    os.unlink(path)
    with pytest.raises(DataError, match=r"rows.jsonl: cannot be read: .*No such file"):
        open_prepared(tmp_path / "prepared", *arguments)


def test_a_file_that_changes_later_is_an_error_of_its_rows(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    arguments = asked(path)
    save_prepared(prepare(*arguments), tmp_path / "prepared")
    opened = open_prepared(tmp_path / "prepared", *arguments)
    with open(path, "a") as file:
        file.write("\n")
    with pytest.raises(SampleError, match="the file has changed since it was opened"):
        opened.train[0]


def test_another_recipe_is_refused(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    save_prepared(prepare(*asked(path)), tmp_path / "prepared")
    data, packing, encoder = asked(path)
    others = [
        asked({"sources": path, "eval": 0.1}),
        asked(path, {"max_length": 9999}),
        (data, packing, by_size("mllava_v1")),
        (data, packing, encoder, 43),
    ]
    for other in others:
        with pytest.raises(AssertionError, match="prepared for another recipe"):
            open_prepared(tmp_path / "prepared", *other)


def test_what_is_saved_takes_the_place_of_what_was(tmp_path):
    (tmp_path / "prepared.tmp-new").mkdir()  # as one that was killed leaves it
    path = write(tmp_path, "rows.jsonl")
    for settings in ({"sources": path}, {"sources": path, "eval": 0.5}):
        arguments = asked(settings)
        prepared = prepare(*arguments)
        save_prepared(prepared, tmp_path / "prepared")
        assert_same(prepared, open_prepared(tmp_path / "prepared", *arguments))
    assert [found.name for found in tmp_path.glob("prepared*")] == ["prepared"]


def test_a_sample_takes_28_bytes(tmp_path):
    arguments = asked(write(tmp_path, "rows.jsonl"))
    train = prepare(*arguments).train
    arrays = [array for field in fields(Samples) if isinstance(array := getattr(train, field.name), np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 28 * ROWS
