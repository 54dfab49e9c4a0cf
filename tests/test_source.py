"""The same rows from every kind of source, the settings that choose among them, and what cannot be opened."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fake_hub import FakeHub

from mantis_lite.data.sample import Image
from mantis_lite.data.schema import parse
from mantis_lite.data.source import open_source
from mantis_lite.errors import DataError, SampleError
from mantis_lite.recipe import SourceRecipe

PNG = io.BytesIO()
PIL.Image.new("RGB", (20, 30)).save(PNG, "PNG")
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def rows_with(*counts: int) -> list[dict]:
    """Rows "0", "1", ... with so many pictures."""
    return [{"id": str(at), "images": ["a.png"] * count, "messages": TURNS} for at, count in enumerate(counts)]


def json_lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def opened(path: object, **settings):
    return open_source(SourceRecipe(path=str(path), **settings))


def all_rows(source) -> list[dict]:
    return [source.row(i) for i in range(len(source))]


def ids(source) -> list[str]:
    return [row["id"] for row in all_rows(source)]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def pictured(datasets):
    """A dataset of rows with one picture, held as bytes, in a column of type Image."""
    rows = [{"id": str(at), "images": [{"bytes": PNG.getvalue(), "path": "a.png"}], "messages": TURNS} for at in (0, 1)]
    turns = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    images = datasets.List(datasets.Image())
    columns = {"id": datasets.Value("string"), "images": images, "messages": datasets.List(turns)}
    return datasets.Dataset.from_list(rows, features=datasets.Features(columns))


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("train.json", lambda rows: json.dumps(rows).encode()),
        ("train.jsonl", json_lines),
        ("train.json.gz", lambda rows: gzip.compress(json.dumps(rows).encode())),
        ("train.jsonl.gz", lambda rows: gzip.compress(json_lines(rows))),
    ],
)
def test_json_files(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(rows_with(1, 0, 2)))
    source = opened(tmp_path / name)
    assert all_rows(source) == rows_with(1, 0, 2)
    assert (source.name, source.media.folder, source.dropped) == (name, tmp_path, {})
    assert [source.where(i) for i in range(3)] == [f"{name}:{number}" for number in (1, 2, 3)]
    assert all_rows(pickle.loads(pickle.dumps(source))) == all_rows(source)


def test_blank_lines_are_skipped_but_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "0"}\n\n  \r\n{"id": "1"}\r\n\n')
    source = opened(tmp_path / "a.jsonl")
    assert ids(source) == ["0", "1"]
    assert [source.where(i) for i in range(2)] == ["a.jsonl:1", "a.jsonl:4"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"id": 1,}', "the row is not JSON: .* column 10"),
        (b'{"id": "\xff"}', "the row is not UTF-8: byte 0xff at 9"),
        (b"[1]", "the row is a list, not an object"),
    ],
)
def test_a_bad_line_is_named_when_it_is_read(tmp_path, line, found):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "0"}\n' + line)
    with pytest.raises(SampleError, match=f"^a.jsonl:2: {found}"):
        opened(tmp_path / "a.jsonl").row(1)


def check_pictured(source, name: str, root: Path) -> None:
    assert (source.name, source.media.folder) == (name, root)
    assert ids(source) == ["0", "1"]
    assert parse(source.row(0), source.where(0), source.media).images == (Image(PNG.getvalue()),)
    assert source.where(1) == f"{name}:2"


def test_parquet_and_saved_datasets(tmp_path, datasets, pictured):
    folder = tmp_path / "odd [name]"
    for name in ("train-0.parquet", "val-0.parquet"):
        pictured.to_parquet(folder / name)
    check_pictured(opened(folder / "val-0.parquet"), "val-0.parquet", folder)
    check_pictured(opened(folder), folder.name, folder)
    check_pictured(opened(folder, split="val"), folder.name, folder)
    pictured.save_to_disk(tmp_path / "one")
    check_pictured(opened(tmp_path / "one"), "one", tmp_path / "one")
    datasets.DatasetDict(train=pictured, val=pictured).save_to_disk(tmp_path / "two")
    check_pictured(opened(tmp_path / "two"), "two:train", tmp_path / "two")
    check_pictured(pickle.loads(pickle.dumps(opened(tmp_path / "two", split="val"))), "two:val", tmp_path / "two")


def test_unnamed_parquet_files_are_all_read(tmp_path, pictured):
    for name in ("part1.parquet", "part2.parquet"):
        pictured.to_parquet(tmp_path / name)
    assert ids(opened(tmp_path)) == ["0", "1", "0", "1"]


@pytest.fixture
def five(tmp_path):
    """Rows with 1, 0, 3, 2, 1 pictures, and a sixth that is bad."""
    path = tmp_path / "train.json"
    path.write_text(json.dumps([*rows_with(1, 0, 3, 2, 1), {"id": "5"}]))
    return path


@pytest.mark.parametrize(
    ("settings", "kept", "dropped"),
    [
        ({}, "012345", {}),
        ({"max_num_images": 1}, "0145", {"max_num_images": 2}),
        ({"vl_only": True}, "02345", {"vl_only": 1}),
        ({"max_size": 2}, "01", {"max_size": 4}),
        ({"max_size": 9}, "012345", {}),
        (
            {"max_num_images": 2, "vl_only": True, "max_size": 2},
            "03",
            {"max_num_images": 1, "vl_only": 1, "max_size": 2},
        ),
    ],
)
def test_settings_choose_rows_and_count_what_they_drop(five, settings, kept, dropped):
    source = opened(five, **settings)
    assert "".join(ids(source)) == kept
    assert source.dropped == dropped
    assert [source.where(i) for i in range(len(source))] == [f"train.json:{int(name) + 1}" for name in kept]


def test_shuffle_is_upstreams_seed_and_comes_first(five):
    order = np.random.default_rng(42).permutation(6)
    assert ids(opened(five, shuffle=True)) == [str(at) for at in order]
    few = [str(at) for at in order if at not in (2, 3)]
    assert ids(opened(five, shuffle=True, max_num_images=1, max_size=3)) == few[:3]


def test_no_row_left(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows_with(3, 0)))
    with pytest.raises(DataError, match=r"a.json: no row is left\n  Left out were 1 by max_num_images, 1 by vl_only"):
        opened(tmp_path / "a.json", max_num_images=2, vl_only=True)


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.json", b"[]", "there are no rows in it\n  Give a source with rows"),
        ("a.jsonl", b"\n \n", "there are no rows in it\n  Give a source with rows"),
        ("a.json", b'{"data": []}', "not a list of rows\n  Write it as"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "not a list of rows\n  .*; if each line is a row, name it .jsonl"),
        ("a.json", b'[{"a": 1},\n {]', "not JSON: .*line 2 column 3\n  Mend it there"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "the file is UTF-16\n  Write it as UTF-8"),
        ("a.json.gz", b"[]", "cannot be read: Not a gzipped file.*\n  Make the file again"),
        ("a.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "cannot be read: .*\n  Make the file again"),
        ("a.csv", b"a,b", "not a kind of file that holds rows\n  Those are: .json, .jsonl"),
        ("a.parquet", b"PAR1", "not Parquet of one layout: .*\n  Write it again"),
        ("b/a.txt", b"", "a folder without .parquet files or a saved dataset\n  Name the file or folder"),
        ("b/val-0.parquet", b"", "no split train\n  Set split to one of: val"),
        ("b/state.json", b"{}", "cannot be read: .*\n  Save it again"),
    ],
)
def test_sources_that_cannot_be_opened(tmp_path, datasets, name, data, found):
    (tmp_path / "b").mkdir()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name.split('/')[0]}: {found}"):
        opened(tmp_path / name.split("/")[0])


@pytest.mark.parametrize(
    ("path", "settings", "found"),
    [
        ("data/trian.json", {}, r"no such file or folder\n  Did you mean data/train.json\?"),
        ("data/other.json", {}, "no such file or folder\n  A dataset on the Hub is user/name"),
        ("nodata/x/y", {}, "no such file or folder\n  A dataset on the Hub is user/name"),
        ("data/train.json", {"split": "train"}, "split=train has no effect on it\n  Remove split"),
        ("data/train.json", {"name": "x"}, "name=x has no effect on it\n  Remove name"),
        ("data", {"revision": "x"}, "revision=x has no effect on it\n  Remove revision"),
        ("ann/pics:one", {"name": "two"}, "name=two, split=None differ from it\n  Write each once"),
        ("ann/pics:one:train", {"split": "val"}, "name=None, split=val differ from it\n  Write each once"),
    ],
)
def test_paths_and_settings_that_do_not_fit(tmp_path, monkeypatch, path, settings, found):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/train.json").write_text("[{}]")
    with pytest.raises(DataError, match=f"^{path}: {found}"):
        opened(path, **settings)


def test_a_saved_split_that_is_not_there(tmp_path, datasets, pictured):
    datasets.DatasetDict(val=pictured, test=pictured).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="two: no split train\n  Set split to one of: test, val"):
        opened(tmp_path / "two")
    pictured.save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="one: split=val has no effect on it\n  Remove split"):
        opened(tmp_path / "one", split="val")


IN_A_PROCESS = """
import json, sys
from mantis_lite.data.source import open_source
from mantis_lite.errors import DataError
from mantis_lite.recipe import SourceRecipe
for settings in json.loads(sys.argv[1]):
    try:
        rows = open_source(SourceRecipe(**settings))
        answer = [rows.where(0), rows.row(0)["images"][0]["bytes"].hex()]
    except DataError as error:
        answer = str(error)
    sys.__stdout__.write(json.dumps(answer) + "\\n")
"""


def asked_of_the_hub(tmp_path, url: str, settings: list[dict], **env: str) -> list:
    """What `open_source` answers in its own process: huggingface_hub reads HF_ENDPOINT when imported."""
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    env |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", IN_A_PROCESS, json.dumps(settings)]
    done = subprocess.run(command, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub(tmp_path, pictured):
    """ann/pics has the configs one (splits train, val) and two; ann/script and ann/bad cannot be read."""
    ann = tmp_path / "hub/datasets/ann"
    for name in ("one/train-0", "one/val-0", "two/train-0"):
        pictured.to_parquet(ann / f"pics/{name}.parquet")
    one = {"config_name": "one", "data_files": [{"split": s, "path": f"one/{s}-*"} for s in ("train", "val")]}
    card = {"configs": [one, {"config_name": "two", "data_files": "two/*"}]}
    (ann / "pics/README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    for name, data in {
        "script/script.py": b"",
        "script/README.md": b"",
        "bad/train.parquet": b"PAR1",
    }.items():
        (ann / name).parent.mkdir(exist_ok=True)
        (ann / name).write_bytes(data)
    with FakeHub(tmp_path / "hub") as hub:
        yield hub


def test_the_hub(tmp_path, hub):
    paths = ["ann/pics:one", "ann/pics:one:val", "ann/pics", "ann/pics:three", "ann/pics:one:test"]
    paths += ["ann/none", "ann/script", "ann/bad"]
    asked = [{"path": path} for path in paths]
    asked += [{"path": "ann/pics", "name": "two", "revision": revision} for revision in ("main", "v9")]
    train, val, no_config, no_such_config, no_such_split, *others = asked_of_the_hub(tmp_path, hub.url, asked)
    no_dataset, script, bad, two, no_revision = others
    assert train == ["ann/pics:one:train:1", PNG.getvalue().hex()]
    assert val == ["ann/pics:one:val:1", PNG.getvalue().hex()]
    assert two == ["ann/pics:two:train:1", PNG.getvalue().hex()]
    assert no_config.startswith("ann/pics: Config name is missing.") and "['one', 'two']" in no_config
    assert no_such_config.startswith("ann/pics:three: BuilderConfig 'three' not found. Available: ['one', 'two']")
    assert no_such_split.startswith("ann/pics:one:test: Unknown split") and "['train', 'val']" in no_such_split
    assert no_such_split.endswith("\n  Name both as user/name:config:split.")
    assert no_dataset.startswith("ann/none: no such file or dataset: Dataset 'ann/none' doesn't exist on the Hub")
    assert no_dataset.endswith("\n  Check its name and revision.")
    assert no_revision.startswith("ann/pics: no such file or dataset: Revision 'v9' doesn't exist")
    assert script.startswith("ann/script: the dataset is a script\n  datasets>=4 runs none")
    assert bad.startswith("ann/bad: ")
    [again, offline] = asked_of_the_hub(
        tmp_path, hub.url, [{"path": "ann/pics:one"}, {"path": "ann/never"}], HF_HUB_OFFLINE="1"
    )
    assert again == train
    assert offline.startswith("ann/never: no answer from the Hub: ") and offline.endswith("\n  Try again later.")
