"""What `check` lists besides single rows: sources, labels, what no pack holds, held-out rows, files of one name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import chat, recipe, write_rows

from mantis_lite.data import media
from mantis_lite.data.prepare import prepare
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.report.check import check
from mantis_lite.report.decoding import Decoded


@pytest.fixture
def checked(folder_of, tmp_path):
    """What check finds wrong, by place, under a recipe of this data."""

    def make(data, decode=True, **settings) -> dict[str, str]:
        model = folder_of("llava")
        found = check(recipe(model, **{"data": data, "packing": {"max_length": 2_000}} | settings), decode)
        make.outlook = found.outlook
        return {reject.where: f"{reject.found}\n  {reject.remedy}" for reject in found.prepared.rejects}

    return make


def rows_of(*texts: str, picture: bool = False) -> list[dict]:
    return [chat("Hi", text, id="same", images=(at,) if picture else ()) for at, text in enumerate(texts)]


def cut(tmp_path, name: str) -> None:
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-600])


def sharing(tmp_path, *rows: tuple[int, ...]) -> str:
    """Rows that have these of three pictures, which lie there once."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, [chat("<image>" * 3, "all", images=(0, 1, 2))])
    lines = [
        chat("<image>" * len(own), "some", id=f"number {at}") | {"images": [f"rows-0-{n}.png" for n in own]}
        for at, own in enumerate(rows, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


SHARED = [(0,), (0, 1), (1,), (2, 0), (0, 2, 1), (2,)]


def test_a_broken_picture_is_a_fault_of_each_row_that_has_it(checked, tmp_path):
    path = sharing(tmp_path, *SHARED)
    cut(tmp_path, "rows-0-1.png")
    found = checked(path)
    assert [*found] == ["rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:5"]
    assert all(f"{tmp_path / 'rows-0-1.png'} cannot be read" in said for said in found.values())


def test_a_picture_that_is_sound_is_decoded_once_while_its_file_is_as_it_was(folder_of, tmp_path, monkeypatch):
    """And what is found of rows is what is found of each alone."""
    asked = recipe(folder_of("llava"), data=sharing(tmp_path, *SHARED))
    encoder = open_checkpoint(asked.model).encoder(asked)
    samples = prepare(asked.data, asked.packing, encoder).train
    cut(tmp_path, "rows-0-1.png")
    every, opened, open_image = [np.arange(len(samples))], [], media.open_image

    def noted(image, *more):
        opened.append(image.source.name)
        return open_image(image, *more)

    monkeypatch.setattr(media, "open_image", noted)
    decoded = Decoded(samples, every, encoder)
    together = decoded[0]
    assert sorted(opened) == ["rows-0-0.png", *["rows-0-1.png"] * 3, "rows-0-2.png"]
    alone = [Decoded(samples, [at], encoder)[0] for at in np.arange(len(samples))[:, None]]
    assert [str(found.fault) for (found,) in alone] == [str(found.fault) for found in together]
    names = [Path(file).name for found in together for file in found.files]
    assert names == ["rows-0-0.png", "rows-0-2.png"]  # each once
    assert {*names} == {Path(file).name for (found,) in alone for file in found.files}
    assert [found.fault and found.fault.sample_id for found in together] == [
        *(None, "number 2", "number 3", None, "number 5", None)
    ]
    os.utime(tmp_path / "rows-0-0.png", (1, 1))
    opened.clear()
    assert len(decoded[0]) == len(samples) and set(opened) == {"rows-0-0.png", "rows-0-1.png"}


def test_rows_that_share_an_id_are_told_apart_by_their_place(checked, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("a", "b", "c", picture=True))
    cut(tmp_path, "rows-1-0.png")
    assert [*checked(path)] == ["rows.jsonl:2"]


def test_files_of_one_name_are_told_apart_by_their_path(checked, tmp_path):
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(write_rows(tmp_path / folder / "train.jsonl", [*rows_of("a"), {"id": "bad", "images": []}]))
    assert [*checked(paths)] == [f"{path}:2" for path in paths]
    assert [*checked({"sources": paths[0], "eval": paths[1]})] == ["train.jsonl:2", f"{paths[1]}:2"]


def test_what_no_pack_holds_is_listed_or_counted(checked, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("a", "b" * 3_000, "c" * 4_000))
    found = checked(path)
    assert [*found] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert all("packing.max_length is 2,000\n  Raise packing.max_length" in said for said in found.values())
    assert checked({"sources": path, "oversize": "drop"}) == {}


@pytest.mark.parametrize("decode", [True, False])
def test_held_out_rows_are_looked_at_as_well(checked, tmp_path, decode):
    path, other = (write_rows(tmp_path / f"{name}.jsonl", rows_of(name, "x", picture=True)) for name in ("a", "b"))
    cut(tmp_path, "b-1-0.png")
    assert [*checked({"sources": path, "eval": other}, decode)] == (["b.jsonl:2"] if decode else [])
    found = checked({"sources": path, "eval": str(tmp_path / "gone.jsonl")}, decode)
    assert found == {str(tmp_path / "gone.jsonl"): found[str(tmp_path / "gone.jsonl")]}


def test_a_list_of_sources_that_is_broken_leaves_the_others(checked, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*rows_of("a"), {"id": "bad", "images": []}])
    (tmp_path / "list.yaml").write_text("data: [{path: gone.jsonl, format: chat, type: jsonl, weight: heavy}]")
    found = checked([path, str(tmp_path / "list.yaml"), {"path": path, "split": "train"}])
    assert found.keys() == {"rows.jsonl:2", str(tmp_path / "list.yaml"), path}
    assert found[path] == "split=train has no effect on it\n  Remove split."


def test_quick_shows_the_first_sample_that_can_be_decoded(checked, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("a", "b", "c", picture=True))
    cut(tmp_path, "rows-0-0.png")
    cut(tmp_path, "rows-2-0.png")
    assert [*checked(path, decode=False)] == ["rows.jsonl:1"]  # come upon on the way
    assert checked.outlook.sample.where == "rows.jsonl:2"
    cut(tmp_path, "rows-1-0.png")
    assert len(checked(path, decode=False)) == 3 and checked.outlook is None


def test_labels_that_say_nothing_are_listed(checked, tmp_path):
    rows = [{"prompt": "Is it good?", "images": [], "label": label} for label in ("yes", "yes", 7.5, float("nan"))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = checked(str(path), task="classify", head={"problem": "single_label"})
    assert [*found][:2] == ["rows.jsonl:3", "rows.jsonl:4"] and len(found) == 3
    assert "NaN is no JSON value" in found["rows.jsonl:4"]
    (whole,) = found.keys() - {"rows.jsonl:3", "rows.jsonl:4"}
    assert whole == "labels" and "yes" in found[whole]
