"""Mementos: its published files as they are, words and lists as they are compared, synonyms and the original's ways."""

import json
import pickle

import benchmarks_made
import fake_hub
import pytest
from test_mvbench import of_the_hub

from mantis_lite.errors import DataError, SampleError
from mantis_lite.evaluate.keywords import TOO_MUCH, as_upstream, as_wanted, keywords, overlap
from mantis_lite.evaluate.mementos import MEMENTOS, SYNONYMS, read_synonyms


def one(folder, lines: bytes):
    """A copy with one sequence of two pictures, 7.png of robo, and this description file."""
    for at in (10, 9):
        file = folder / f"single_image_robo/7/{at}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(benchmarks_made.png(at))
    (folder / "robo_description.csv").write_bytes(lines)
    return str(folder)


def test_descriptions_are_kept_whole(tmp_path):
    """Line ends and separators within one, curly quotes, and a mark of byte order before all."""
    told = 'A robot\u2019s arm\nmoves\u2028a can, "here".'
    row = '\ufeffimage,description\r\n7.png,"' + told.replace('"', '""') + '"\r\n'
    (asked,) = MEMENTOS.read(one(tmp_path, row.encode()), "own")
    assert asked.answer == told and asked.id == "robo-7"
    assert [image.source.name for image in asked.sample.images] == ["9.png", "10.png"], "by number"
    (spoilt,) = MEMENTOS.read(one(tmp_path, row[1:].encode()), "upstream")
    assert spoilt.answer == told.encode().decode("latin-1")


def test_a_cut_off_character_is_told(tmp_path, caplog):
    source = one(tmp_path, b"image,description\n7.png,A caf\xc3\n")
    assert MEMENTOS.read(source, "own")[0].answer == "A caf\ufffd"
    assert "robo_description.csv has 1 characters that are no UTF-8" in caplog.text


def test_words_are_compared_by_their_stems():
    assert keywords("The robot's arms were moving; it doesn't 2 a") == {"robot", "arm", "move", "doesn"}
    found = overlap(keywords("Moves an arm, an arm and a jar"), keywords("The robot moved its arms"))
    assert found == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert overlap(["dog"], ["dog", "ball"]) == pytest.approx((1, 1 / 2, 2 / 3))
    assert overlap([], ["dog"]) == overlap(["dog"], []) == overlap([], []) == (0, 0, 0)


def test_a_synonym_counts_as_what_is_wanted():
    known = {"pup": ["animal", "dog"], "ball": ["sphere"], "look up": ["watch"]}
    assert as_wanted(["pup", "ball", "look up", "tree"], ["dog", "ball", "watch"], known) == {
        "dog",
        "ball",
        "watch",
        "tree",
    }


@pytest.mark.parametrize(
    ("said", "wanted", "most", "found"),
    [
        (["pup", "ball"], ["dog", "ball"], 1, {"dog", "ball"}),
        (["pup", "hound"], ["dog", "cat"], 1, {"dog", "hound"}),  # dog is taken: hound has none left
        (["pup", "dog", "cat", "cow"], ["dog"], 1, {"dog", TOO_MUCH}),  # whatever is left over is one
        (["cat", "cow"], ["dog"], 1, {"cat", "cow"}),  # none is taken, so none is left over
        (["look", "up", "run"], ["watch", "go"], 2, {"watch", "run"}),
        (["look", "up"], ["watch"], 1, {"look", "up"}),
        (["look up"], ["watch"], 2, {"look up"}),  # words in a row are items of the list
        ([""], [""], 1, {""}),
    ],
)
def test_the_originals_synonyms(said, wanted, most, found):
    known = {"pup": ["dog"], "hound": ["dog"], "look up": ["watch"]}
    assert as_upstream(said, wanted, known, most) == found


def test_synonyms_are_read_from_json_and_from_no_pickle(tmp_path):
    assert read_synonyms(str(tmp_path)) == {"objects": {}, "actions": {}}
    (tmp_path / "sym_graphs").mkdir()
    (tmp_path / "sym_graphs/dl_object_graph_v1.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(
        DataError, match=r"v1.pkl: a pickle, which can run anything as it is read, and is not\n  Write "
    ):
        read_synonyms(str(tmp_path))
    (tmp_path / SYNONYMS).write_text('{"objects": {"pup": "dog", "hut": ["house", "home"]}, "actions": {}}')
    assert read_synonyms(str(tmp_path)) == {"objects": {"pup": ["dog"], "hut": ["house", "home"]}, "actions": {}}
    for broken in ('{"objects": {"pup": 1}, "actions": {}}', '{"objects": {"pup": [1]}, "actions": {}}', "[]", "{"):
        (tmp_path / SYNONYMS).write_text(broken)
        with pytest.raises(DataError, match=r"synonyms.json: not two mappings of words to words\n  Write "):
            read_synonyms(str(tmp_path))


def publish(root, images: int) -> None:
    """A dataset of Mantis' rows, one a split, of pictures that are joined and of those by themselves."""
    splits = [f"{kind}image_{name}" for name in ("cmc", "dl", "robo") for kind in ("", "single_")]
    for split in splits:
        row = {"id": "7", "images": [benchmarks_made.image(1)] * images, "answer": f"Of {split}."}
        benchmarks_made.parquet(root / f"mementos/{split}-0.parquet", [row])
    files = [{"split": split, "path": f"mementos/{split}-*"} for split in splits]
    card = {"configs": [{"config_name": "mementos", "data_files": files}]}
    (root / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")


@pytest.mark.slow
def test_the_hub(tmp_path):
    publish(tmp_path / "hub/datasets/own/mementos", 15)
    publish(tmp_path / "hub/datasets/own/empty", 0)
    with fake_hub.FakeHub(tmp_path / "hub") as hub:
        asked = [("mementos", "own/mementos", "upstream"), ("mementos", "own/empty", "own")]
        found, empty = of_the_hub(tmp_path, hub.url, asked)
    assert [(name, told) for name, told, *_ in found] == [
        (f"{name}-7", f"Of single_image_{name}.") for name in ("cmc", "dl", "robo")
    ]
    assert all(len(images) == 13 for *_, images in found)
    assert "no pictures or no description\n  Give the benchmark's own columns" in empty


def test_rows_that_are_none(tmp_path):
    with pytest.raises(SampleError, match=r"robo_description.csv:2: no picture or no description\n"):
        MEMENTOS.read(one(tmp_path, b"picture,told\n7.png,A robot.\n"), "own")
