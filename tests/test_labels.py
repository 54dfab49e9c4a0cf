"""Labels of every spelling, and every way in which they can be wrong, told before training starts."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import by_size

from mantis_lite.data.encode import Score
from mantis_lite.data.labels import Labels, RowLabels, name_labels, read_labels, some
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.prepare import prepare
from mantis_lite.data.sample import Image, Sample, Turn, Video
from mantis_lite.data.schema import parse
from mantis_lite.data.source import open_source
from mantis_lite.errors import DataError, SampleError
from mantis_lite.recipe import DataRecipe, HeadRecipe, PackingRecipe, SourceRecipe

ROOT = Path("/data")
P, Q, A = Image(ROOT / "p.jpg"), Image(ROOT / "q.jpg"), Video(ROOT / "a.mp4")
ANY = {"prompt": "How good?"}


def read(row: dict) -> Sample:
    return parse(row, "rows.json:3", MediaFolder(ROOT), "classify")


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"prompt": "How good?"}, ("How good?",)),
        ({"prompt": "How good?", "image": "p.jpg"}, ("How good?", P, " ")),
        ({"prompt": "Is <image> as <image>?", "images": ["p.jpg", "q.jpg"]}, ("Is ", P, " as ", Q, "?")),
        ({"prompt": "<image>?", "images": ["p.jpg", "q.jpg"]}, (P, "?", Q, " ")),
        ({"prompt": "How good?", "video": "a.mp4"}, ("How good?", A, " ")),
        ({"prompt": "<image> How?", "video": "a.mp4"}, (A, " How?")),
        ({"prompt": "<video>?", "video": "a.mp4", "images": ["p.jpg"]}, (A, "?", P, " ")),
        ({"prompt": "HTML's <image>"}, ("HTML's <image>",)),
        ({"images": ["p.jpg", "q.jpg"]}, (P, " ", Q, " ")),
        ({"prompt": None, "image": "p.jpg"}, (P, " ")),
    ],
)
def test_a_prompt_with_its_pictures(row, content):
    assert read(row | {"label": "x"}).turns == (Turn("user", content),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "neither a prompt nor a picture"),
        ({"prompt": 3}, '"prompt" is a number\n  Give a string.'),
        ({"prompt": "<image><image>", "image": "p.jpg"}, "1 image but 2 <image> marks"),
        ({"prompt": "<video>"}, "0 videos but 1 <video> mark"),
        ({"messages": [{"role": "user", "content": "x"}]}, 'this is a chat row: it has "messages" and no "prompt"'),
        ({"prompt": "x", "label": 1, "labels": {"a": 1}}, '"label" and "labels" both say what is right\n  Keep one'),
        ({"prompt": "x\ud83d"}, "a turn of the user has half a character"),
    ],
)
def test_what_is_wrong_with_a_row(row, message):
    with pytest.raises(SampleError) as caught:
        read(row)
    assert str(caught.value).startswith(f"rows.json:3: {message}")


@pytest.mark.parametrize(
    ("problem", "labels", "values"),
    [
        ("regression", {"labels": {"a": 1, "b": 2.5}}, {"a": 1.0, "b": 2.5}),
        ("regression", {"labels": {"a": 1, "b": None}}, {"a": 1.0}),
        ("regression", {"label": 3}, {"label": 3.0}),
        ("single_label", {"label": "cat"}, {"cat": 1.0}),
        ("single_label", {"labels": "cat"}, {"cat": 1.0}),
        ("single_label", {"label": 3}, {"3": 1.0}),
        ("single_label", {"label": False}, {"false": 1.0}),
        ("single_label", {"labels": {"cat": 0, "dog": 1.0}}, {"dog": 1.0}),
        ("multi_label", {"labels": ["cat", "dog"]}, {"cat": 1.0, "dog": 1.0}),
        ("multi_label", {"labels": []}, {}),
        ("multi_label", {"labels": {"cat": 0, "dog": True}}, {"cat": 0.0, "dog": 1.0}),
    ],
)
def test_every_spelling_of_labels(problem, labels, values):
    found = read_labels(read(ANY | labels), problem)
    assert found == (values, isinstance(labels.get("labels"), dict), "rows.json:3", None)


NAN = float("nan")


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        ("regression", {}, 'the row has no labels\n  Add "labels", or "label"'),
        ("regression", {"labels": {}}, "the labels are empty"),
        (
            "regression",
            {"labels": {"a": "3"}},
            "the label 'a' is '3', not a number\n  Give a number, or set head.problem",
        ),
        ("regression", {"label": "good"}, "the label 'label' is 'good', not a number"),
        ("regression", {"labels": {"a": True}}, "the label 'a' is True, not a number"),
        ("regression", {"labels": {"a": NAN}}, "the label 'a' is nan\n  Give a finite number, of at most 3.4e38."),
        ("regression", {"label": 1e39}, "the label 'label' is 1e+39\n  Give a finite number"),
        ("regression", {"labels": {"a": float("inf")}}, "the label 'a' is inf"),
        ("regression", {"labels": ["a"]}, "the label 'label' is ['a'], not a number"),
        (
            "single_label",
            {"label": 2.5},
            "the label is 2.5, not a class\n  Give a class's name, or set head.problem=regr",
        ),
        ("single_label", {"label": ""}, "the label is '', not a class"),
        ("single_label", {"labels": ["cat"]}, "the label is ['cat'], not a class"),
        ("single_label", {"labels": {"cat": 0.5}}, "the label 'cat' is 0.5 where 0 or 1 is meant"),
        ("single_label", {"labels": {"cat": 1, "dog": 1}}, "2 of the row's classes hold, and it can be of one only"),
        ("single_label", {"labels": {"cat": 0}}, "0 of the row's classes hold"),
        ("multi_label", {"labels": "cat"}, "the labels are 'cat', not a list of those that hold"),
        ("multi_label", {"labels": {"cat": 2}}, "the label 'cat' is 2 where 0 or 1 is meant"),
        ("multi_label", {"labels": [NAN]}, "the label is nan, not a class"),
        ("single_label", {"label": "\ud83d"}, "the label '\\ud83d' has half a character\n  Write its other half"),
    ],
)
def test_labels_that_are_none(problem, labels, message):
    with pytest.raises(SampleError) as caught:
        read_labels(read(ANY | labels), problem)
    assert str(caught.value).startswith(f"rows.json:3: {message}")


def rows_of(*values: dict) -> list[RowLabels]:
    return [RowLabels(found, True, f"rows:{at}", None) for at, found in enumerate(values, 1)]


def test_names_and_their_order():
    numbers = rows_of({"b": 1.0, "a": 2.0}, {"c": 1.0})
    assert name_labels("regression", None, numbers).names == ("b", "a", "c")  # the first row's order, as upstream
    counted = rows_of({"10": 1.0}, {"2": 1.0}, {"x": 1.0}, {"0": 1.0})
    assert name_labels("single_label", None, counted).names == ("0", "2", "10", "x")
    classes = rows_of({"dog": 1.0}, {"cat": 1.0})
    assert name_labels("single_label", None, classes) == name_labels("single_label", None, classes[::-1])
    assert name_labels("single_label", None, classes).names == ("cat", "dog")
    assert name_labels("single_label", ["dog", "cat", "cow"], classes).names == ("dog", "cat", "cow")


def prepared(tmp_path, labels: list, problem: str, stated=None, held_out=None, **data):
    rows = [ANY | (found if isinstance(found, dict) and "label" in found else {"labels": found}) for found in labels]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    if held_out is not None:
        data["eval"] = str(tmp_path / "held_out.json")
        (tmp_path / "held_out.json").write_text(json.dumps([ANY | {"labels": found} for found in held_out]))
    sources = DataRecipe(sources=[SourceRecipe(path=str(tmp_path / "rows.json"))], **data)
    head = HeadRecipe(problem=problem, labels=stated)
    return prepare(sources, PackingRecipe(), by_size(score=Score()), task="classify", head=head)


def test_targets_of_numbers_follow_the_names(tmp_path):
    found = prepared(tmp_path, [{"b": 1, "a": 2}, {"a": 3, "b": 4}], "regression", held_out=[{"a": 5, "b": 6}])
    assert found.labels == Labels("regression", ("b", "a"))
    assert found.train.targets.tolist() == [[1, 2], [4, 3]] and found.train.targets.dtype == np.float32
    assert found.held_out.targets.tolist() == [[6, 5]]
    stated = prepared(tmp_path, [{"b": 1, "a": 2}, {"a": 3, "b": 4}], "regression", stated=["a", "b"])
    assert stated.train.targets.tolist() == [[2, 1], [3, 4]]


def test_targets_of_one_number_by_any_name(tmp_path):
    found = prepared(tmp_path, [{"label": 1}, {"label": 2}], "regression")
    assert found.labels.names == ("label",) and found.train.targets.tolist() == [[1], [2]]
    named = prepared(tmp_path, [{"label": 1}, {"label": 2}], "regression", stated=["quality"])
    assert named.labels.names == ("quality",) and named.train.targets.tolist() == [[1], [2]]


def test_targets_of_classes_and_of_lists(tmp_path):
    found = prepared(tmp_path, ["dog", "cat", "dog"], "single_label", held_out=["cat"])
    assert found.train.targets.tolist() == [1, 0, 1] and found.train.targets.dtype == np.int64
    assert found.held_out.targets.tolist() == [0]
    several = prepared(tmp_path, [["dog"], [], ["cat", "dog"]], "multi_label")
    assert several.train.targets.tolist() == [[0, 1], [0, 0], [1, 1]]


def test_targets_stay_with_their_rows_when_some_are_held_out(tmp_path):
    labels = [{"label": number} for number in range(10)]
    found = prepared(tmp_path, labels, "regression", eval=0.3)
    for samples in (found.train, found.held_out):
        assert [sample.labels for sample in samples] == samples.targets[:, 0].tolist()
    assert len(found.held_out) == 3


@pytest.mark.parametrize(
    ("problem", "labels", "settings", "message"),
    [
        (
            "regression",
            [{"a": 1, "b": 1}, {"a": 1}],
            {},
            "rows.json:2: no value for the label 'b', which rows.json:1 has\n",
        ),
        ("regression", [{"a": 1}, {"a": 1, "b": 2}], {}, "rows.json:1: no value for the label 'b'"),
        (
            "regression",
            [{"a": 1}],
            {"stated": ["b"]},
            "rows.json:1: the label 'a' is none of b\n  Mend the row, or add it",
        ),
        (
            "regression",
            [{"label": 1}],
            {"stated": ["a", "b"]},
            "rows.json:1: one number for 2 labels\n  Give one by name",
        ),
        (
            "single_label",
            ["cat", "dog", "cow"],
            {"stated": ["cat", "dog"]},
            "rows.json:3: the label 'cow' is none of cat",
        ),
        ("single_label", ["cat", "dog"], {"held_out": ["cow"]}, "held_out.json:1: the label 'cow' is none of cat, dog"),
        ("single_label", ["cat", "cat"], {}, "labels: all 2 rows to train on are of the class 'cat', so there"),
        ("single_label", ["cat"], {"stated": ["cat", "dog"]}, "labels: all 1 rows to train on are of the class 'cat'"),
        ("single_label", ["cat"] * 9 + ["dog"], {"eval": 0.9}, "labels: all 1 rows to train on are of the class"),
        ("multi_label", [[], []], {}, "labels: no row has a label that holds\n  Add rows with labels."),
        (
            "multi_label",
            [["a"], ["a"]],
            {},
            "labels: each of a is the same in all 2 rows\n  Add rows with other labels.",
        ),
        ("regression", [{"a": 1}, {"a": NAN}], {}, "rows.json:2: the row is not JSON: NaN is no JSON value"),
        ("regression", [{"a": 1}, None], {}, "rows.json:2: the row has no labels"),
    ],
)
def test_bad_labels_are_told_before_training(tmp_path, problem, labels, settings, message):
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, labels, problem, **settings)
    assert str(caught.value).startswith(message)


def test_a_bad_label_is_a_bad_row_like_any_other(tmp_path):
    found = prepared(tmp_path, [{"a": 1}, {"a": 2}, {"a": "x"}], "regression", on_bad_row="skip")
    assert [reject.where for reject in found.rejects] == ["rows.json:3"]
    found = prepared(tmp_path, [{"a": 1}, {"a": 2}, {"b": 1}], "regression", stated=["a"], on_bad_row="skip")
    assert [reject.where for reject in found.rejects] == ["rows.json:3"] and found.train.targets.tolist() == [[1], [2]]


def test_a_label_that_never_changes_is_said(tmp_path):
    found = prepared(tmp_path, [{"a": 1, "b": 2}, {"a": 1, "b": 3}], "regression")
    assert found.notices == {"the label 'a' has the same value in every row to train on": 1}
    absent = prepared(tmp_path, ["cat", "dog"], "single_label", stated=["cow", "cat", "dog"])
    assert absent.notices == {"no row to train on is of the class cow": 1}


def test_a_message_names_a_few_of_many():
    assert some("abc") == "a, b, c" and some("abcdefghijklm") == "a, b, c, d, e, f, g, h, i, j and 3 more"


def test_classes_of_a_dataset_go_by_their_names(tmp_path):
    features = Features({"prompt": Value("string"), "label": ClassLabel(names=["dog", "cat"])})
    made = Dataset.from_dict({"prompt": ["x", "y", "z"], "label": [1, 0, None]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    rows = open_source(SourceRecipe(path=str(tmp_path / "saved")), "classify")
    assert [rows.sample(at).labels for at in range(3)] == ["cat", "dog", None]
