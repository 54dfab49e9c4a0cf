"""Rows are read, checked and measured once: what is refused says why, and a second start measures nothing."""

import json
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest
from helpers import by_size, chat, picture, recipe, write_rows

from mantis_lite.data import media
from mantis_lite.data.lengths import cache_dir
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.prepare import Prepared, prepare, write_rejects
from mantis_lite.data.schedule import pack_epoch
from mantis_lite.data.schema import parse
from mantis_lite.errors import DataError, FitError, SampleError
from mantis_lite.recipe import PackingRecipe

ENCODER = by_size()
MANY = {"max_length": 10_000}


def rows_of(count: int) -> list[dict]:
    """Rows "0", "1", ... of 0-2 pictures, each longer than the last."""
    return [
        chat("Hi" * (at + 1), "Ho", images=tuple(range(at % 3)), id=str(at)) | {"number": at} for at in range(count)
    ]


def ready(data, packing=MANY, encoder=ENCODER, **settings) -> Prepared:
    sources = {"sources": data}
    found = recipe(data=sources | settings, packing=packing)
    return prepare(found.data, found.packing, encoder)


def ids(samples) -> list[str]:
    return [sample.id for sample in samples]


def spoil(path: str, at: int, **change) -> None:
    """Change a row of a file of rows."""
    lines = Path(path).read_text().splitlines()
    lines[at] = json.dumps(json.loads(lines[at]) | change)
    Path(path).write_text("\n".join(lines) + "\n")


def test_every_row_with_its_length(tmp_path):
    rows = rows_of(10)
    prepared = ready(write_rows(tmp_path / "rows.jsonl", rows))
    assert ids(prepared.train) == [str(at) for at in range(10)]
    assert prepared.train.images.tolist() == [at % 3 for at in range(10)]
    for row, sample, length in zip(rows, prepared.train, prepared.train.lengths, strict=True):
        assert length[0] == len(ENCODER.encode(sample)) == len(ENCODER.encode(parse(row, "", MediaFolder(tmp_path))))
        assert length[1] == len(sample.images) * (40 * 30 // 16)
    assert (prepared.rows_read, prepared.rejects, prepared.oversize, prepared.held_out) == (10, [], 0, None)


BAD_ROWS = pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"images": ["missing.png"]},
        {"images": ["rows.jsonl"]},
        {"images": ["a\0b.png"]},
        {"messages": chat("Hi", "half an emoji: \ud83d")["messages"]},
    ],
    ids=["turns", "missing", "no picture", "no path", "half a character"],
)


@BAD_ROWS
def test_a_bad_row_is_an_error(tmp_path, change):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(4))
    spoil(path, 2, **change)
    with pytest.raises(SampleError, match=r'^rows.jsonl:3 \(id "2"\)'):
        ready(path)


@BAD_ROWS
def test_a_bad_row_is_skipped_and_written_down(tmp_path, change):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(4))
    spoil(path, 2, **change)
    prepared = ready(path, on_bad_row="skip")
    assert ids(prepared.train) == ["0", "1", "3"] and prepared.rows_read == 4
    write_rejects(prepared.rejects, tmp_path / "rejects.jsonl")
    write_rejects(prepared.rejects, tmp_path / "rejects.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    error = prepared.rejects[0]
    fields = {"where": "rows.jsonl:3", "id": "2", "found": error.found, "remedy": error.remedy}
    assert lines == [fields, fields] and error.found and error.remedy


@pytest.mark.parametrize(("rows", "bad", "stops"), [(300, 3, False), (300, 4, True), (4, 1, False), (4, 2, True)])
def test_more_than_one_in_a_hundred_is_an_error_all_the_same(tmp_path, rows, bad, stops):
    path = write_rows(tmp_path / "rows.jsonl", [chat(f"Hi {at}", "Ho") for at in range(rows)])
    for at in range(bad):
        spoil(path, at, messages=[])
    if not stops:
        assert len(ready(path, on_bad_row="skip").train) == rows - bad
        return
    with pytest.raises(DataError) as caught:
        ready(path, on_bad_row="skip")
    share = f"{bad} of {rows} rows cannot be used ({bad / rows:.1%}), more than the 1% that may be skipped"
    assert str(caught.value).startswith(f'{share}; the first is\n  rows.jsonl:1: "messages" is empty')


@pytest.mark.parametrize("budget", ["tokens", "patches"])
def test_a_row_larger_than_a_pack(tmp_path, budget):
    rows = [chat("Hi", "Ho", id="0"), chat("<image><image>", "Ho" * 600, images=(1, 2), id="1")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    tokens, patches = ready(path).train.lengths[1].tolist()
    limit = {"max_length": tokens - 1} if budget == "tokens" else {"max_length": tokens, "max_patches": patches - 1}
    with pytest.raises(FitError) as caught:
        ready(path, limit)
    if budget == "tokens":
        found = f"needs {tokens:,} tokens (2 images); packing.max_length is {tokens - 1:,}"
        remedy = "Raise packing.max_length, or set data.oversize=drop."
    else:
        found = f"needs {patches:,} patches (2 images); packing.max_patches is {patches - 1:,}"
        remedy = "Raise packing.max_patches, lower media.max_image_size, or set data.oversize=drop."
    assert str(caught.value) == f'rows.jsonl:2 (id "1"): {found}\n  {remedy}'
    dropped = ready(path, limit, oversize="drop")
    assert (ids(dropped.train), dropped.oversize, dropped.rejects) == (["0"], 1, [])
    assert ids(ready(path, {"max_length": tokens, "max_patches": patches}).train) == ["0", "1"]


def test_no_row_left_is_an_error(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(3))
    with pytest.raises(DataError, match="no row is left to train on, of 3 read"):
        ready(path, {"max_length": 5}, oversize="drop")


def test_notices_are_counted(tmp_path):
    greeting = {"role": "assistant", "content": "Welcome"}
    rows = [row | {"messages": [greeting, *row["messages"]]} for row in rows_of(3)] + rows_of(2)
    prepared = ready({"path": write_rows(tmp_path / "rows.jsonl", rows), "max_size": 4})
    assert prepared.notices == Counter({"first turn was the assistant's and was dropped": 3, "max_size": 1})


@pytest.mark.parametrize(("share", "expected"), [(0.2, 4), (0.01, 1)])
def test_a_share_is_held_out(tmp_path, share, expected):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(20))
    prepared, again = (ready(path, eval=share) for _ in range(2))
    assert len(prepared.held_out) == expected
    assert sorted([*ids(prepared.train), *ids(prepared.held_out)]) == sorted(ids(ready(path).train))
    assert ids(prepared.held_out) == ids(again.held_out)
    lengths = dict(zip(ids(ready(path).train), ready(path).train.lengths.tolist(), strict=True))
    for part in (prepared.train, prepared.held_out):
        assert part.lengths.tolist() == [lengths[i] for i in ids(part)]


def test_a_file_is_held_out(tmp_path):
    train, held_out = (write_rows(tmp_path / f"{name}.jsonl", rows_of(n)) for name, n in (("a", 5), ("b", 2)))
    prepared = ready(train, eval=held_out)
    assert (len(prepared.train), ids(prepared.held_out), prepared.rows_read) == (5, ["0", "1"], 7)


def test_weights_say_how_often_a_source_is_drawn(tmp_path):
    sources = [
        {"path": write_rows(tmp_path / f"{name}.jsonl", [chat(name, "Ho", id=f"{name}{at}") for at in range(4)])}
        | {"weight": weight}
        for name, weight in (("once", 1), ("twice", 2), ("half", 0.5), ("more", 1.25))
    ]
    train = ready(sources).train
    epochs = [
        Counter(train[i].id for pack in pack_epoch(train, PackingRecipe(), epoch) for i in pack) for epoch in (0, 1)
    ]
    for drawn in epochs:
        assert [drawn[f"once{at}"] for at in range(4)] == [1] * 4
        assert [drawn[f"twice{at}"] for at in range(4)] == [2] * 4
        assert sorted(drawn[f"half{at}"] for at in range(4)) == [0, 0, 1, 1]
        assert sorted(drawn[f"more{at}"] for at in range(4)) == [1, 1, 1, 2]
    several = {tuple(pack_drawn(train, epoch)) for epoch in range(8)}
    assert len(several) > 1  # the share is drawn anew each epoch


def pack_drawn(train, epoch: int) -> list[int]:
    return sorted(i for pack in pack_epoch(train, PackingRecipe(), epoch) for i in pack)


def test_a_mantis_data_config_is_a_list_of_sources(tmp_path):
    for name, count in (("a", 3), ("b", 5)):
        write_rows(tmp_path / f"{name}.jsonl", rows_of(count))
    config = tmp_path / "data_config.yaml"
    config.write_text(
        "data:\n"
        "  - {name: first, type: jsonl, path: a.jsonl, format: chat, split: train}\n"
        "  - {path: b.jsonl, type: jsonl, format: chat, max_size: 2, weight: 3}\n"
    )
    from_config = ready({"path": str(config), "weight": 0.5})
    listed = ready([str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl"), "max_size": 2}])
    assert ids(from_config.train) == ids(listed.train) == ["0", "1", "2", "0", "1"]
    assert from_config.train.lengths.tolist() == listed.train.lengths.tolist()
    assert from_config.train.weights == [0.5, 1.5]  # its own, times the recipe's


class Poisoned:
    """A tokenizer that must not be asked."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts, **_):
        assert not texts, "tokenised again"
        return []


def remembered(path, monkeypatch) -> Prepared:
    """Prepare again, where neither a text may be tokenised nor a picture opened."""
    poisoned = by_size()
    object.__setattr__(poisoned, "tokenizer", Poisoned(poisoned.tokenizer))
    with monkeypatch.context() as patch:
        patch.setattr(media, "size", None)
        return ready(path, encoder=poisoned)


def test_a_second_start_measures_nothing(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(600))  # more than one chunk
    with pytest.raises((AssertionError, TypeError)):
        remembered(path, monkeypatch)
    first = ready(path)
    assert remembered(path, monkeypatch).train.lengths.tolist() == first.train.lengths.tolist()


def test_a_picture_that_has_changed_is_measured_anew(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(4))
    before = ready(path).train.lengths.tolist()
    width, height = PIL.Image.open(tmp_path / "rows-2-1.png").size
    (tmp_path / "rows-2-1.png").write_bytes(picture(1, width + 40, height))
    after = ready(path).train.lengths.tolist()
    assert [b == a for b, a in zip(before, after, strict=True)] == [True, True, False, True]
    # 40 px more are 40 // 4 tokens and 40 * height / 16 patches
    assert after[2] == [before[2][0] + 10, before[2][1] + 40 * height // 16]


def test_a_text_that_has_changed_is_measured_anew(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(4))
    ready(path)
    spoil(path, 0, messages=chat("Hi", "Another answer")["messages"])
    with pytest.raises(AssertionError, match="tokenised again"):
        remembered(path, monkeypatch)
    train = ready(path).train
    assert train.lengths[0, 0] == len(ENCODER.encode(train[0]))


@pytest.mark.parametrize("share", [0, 0.05, 0.6, 0.99], ids=["empty", "in the header", "in the middle", "at the end"])
def test_a_cache_cut_short_is_made_anew(tmp_path, monkeypatch, share):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(30))
    first = ready(path)
    (file,) = cache_dir().glob("lengths-*/index")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    assert ready(path).train.lengths.tolist() == first.train.lengths.tolist()
    assert file.read_bytes() == whole
    assert remembered(path, monkeypatch).train.lengths.tolist() == first.train.lengths.tolist()
    assert {part.name for part in file.parent.iterdir()} == {"index", "lock"}  # nothing half-written is left beside it
