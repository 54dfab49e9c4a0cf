"""Upstream's data_config.yaml is read as it is: each key is honoured, said to have no effect, or refused."""

import json
from math import isqrt, sqrt
from pathlib import Path

import numpy as np
import pytest
from helpers import by_size, chat, write_rows
from hypothesis import given
from hypothesis import strategies as st

from mantis_lite.data.mixing import by_square_root
from mantis_lite.data.mixture import SCRIPT, sources_of
from mantis_lite.data.prepare import prepare
from mantis_lite.data.repository import INSTRUCT, SHORT
from mantis_lite.data.schedule import pack_epoch
from mantis_lite.errors import DataError, RecipeError
from mantis_lite.recipe import DataRecipe, MediaRecipe, PackingRecipe, SourceRecipe
from mantis_lite.recipe_file import recipes_dir

OFF = PackingRecipe(enabled=False)


def entry(**keys) -> dict:
    return {"path": INSTRUCT, "name": "nlvr2", "format": "chat", "split": "train"} | keys


def read(folder: Path, *entries: dict, **settings) -> tuple[list[dict], list[str]]:
    (folder / "config.yaml").write_text(json.dumps({"data": entries}))  # JSON is YAML too
    found, notices = sources_of(SourceRecipe(path=str(folder / "config.yaml")), "chat", **settings)
    return [source.model_dump(exclude_defaults=True) for source in found], notices


def test_a_data_config_lists_sources(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    kept = {"max_size": 5, "shuffle": True, "max_num_images": 4, "vl_only": True}
    unset = {"max_seq_len": None, "packing_same_mm_media": False, "max_size": None}
    (nlvr2, local, elsewhere), notices = read(
        tmp_path,
        entry(type="huggingface", revision="main", weight=0.5, **kept),
        entry(name="a label", type="json", path="train.json", revision="v2", **unset),
        entry(type="jsonl", path="other.jsonl", sample_ratio=2),
    )
    whole = {"path": INSTRUCT, "name": "nlvr2", "split": "train", "revision": "main", "weight": 0.5}
    assert nlvr2 == whole | kept
    assert local == {"path": str(tmp_path / "train.json")}
    assert elsewhere == {"path": "other.jsonl", "weight": 2.0}
    assert notices == []


def test_what_has_no_effect_is_said(tmp_path):
    (one, two), notices = read(
        tmp_path,
        entry(revision="script", offline_sha="ab" * 32, packing_same_mm_media=True),
        entry(name="lrv", revision="script", max_seq_len=8192),
    )
    assert one == {"path": INSTRUCT, "name": "nlvr2", "split": "train"} == two | {"name": "nlvr2"}
    assert two["name"] == "lrv_multi"
    assert [notice.partition(":")[0] for notice in notices] == [
        *("offline_sha", "packing_same_mm_media", "revision", "max_seq_len", "revision", INSTRUCT),
    ]
    assert notices.count(SCRIPT) == 2 and notices[-1] == f"{INSTRUCT}: lrv is called lrv_multi now"


def test_what_is_set_for_all_may_be_said_of_one(tmp_path):
    media = MediaRecipe(max_image_size=364, num_frames=8)
    found, notices = read(tmp_path, entry(max_image_size=364, max_num_frames=8, max_seq_len=9000), media=media)
    assert len(found) == 1 and len(notices) == 1
    with pytest.raises(DataError, match=r"data\[0\].max_image_size: 364 is not read here"):
        read(tmp_path, entry(max_image_size=364), media=MediaRecipe(max_image_size=728))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"format": "chat_video"}, "format: chat_video belongs to task=video; here is read chat"),
        ({"format": "classification"}, "format: classification belongs to task=classify"),
        ({"format": "siglip_video"}, "format: siglip_video belongs to task=none"),
        ({"type": "csv"}, "type: csv is not known; write huggingface, json or jsonl"),
        ({"split": "val"}, "split: val is not trained on; name it in data.eval"),
        ({"path": None}, "path: missing; write the file"),
        ({"max_seq_len": 8191}, "max_seq_len: 8191 would cut rows .*; rows are not cut here: set packing.max_length="),
        ({"max_image_size": 980}, "max_image_size: 980 is not read here for one source; set media.max_image_size=980"),
        ({"sample_ratio": 0.5, "weight": 2}, "sample_ratio: is the weight, and weight is there too; keep one"),
        ({"num_frames": 8}, "num_frames: 8 is not read here for one source; set media.num_frames=8 for all"),
        ({"fps": 2}, "fps: 2 is not read here for one source; set media.fps=2 for all, or remove it"),
        ({"max_sise": 8}, r"max_sise: no such key; did you mean max_size\?"),
        ({"colour": 8}, "colour: no such key; remove it"),
    ],
)
def test_a_data_config_key_that_cannot_be_honoured(tmp_path, keys, problem):
    with pytest.raises(DataError, match=rf"config.yaml: data\[1\].{problem}"):
        read(tmp_path, entry(), entry(**keys))


@pytest.mark.parametrize(
    ("keys", "found"),
    [({"max_size": -1}, "max_size: .* found -1"), ({"sample_ratio": 0}, "sample_ratio: .* found 0")],
)
def test_a_value_that_cannot_be(tmp_path, keys, found):
    with pytest.raises(DataError, match=f"config.yaml: {found}\n  Mend the entry"):
        read(tmp_path, entry(**keys))


@pytest.mark.parametrize("text", ["", "data: []", "data: [x]", "- x"])
def test_a_data_config_without_sources(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config.yaml: no list of sources\n  Write them under `data:`"):
        sources_of(SourceRecipe(path=str(tmp_path / "config.yaml")), "chat")


def test_a_data_config_that_cannot_be_read(tmp_path):
    (tmp_path / "config.yaml").write_text("data: [")
    for name in ("config.yaml", "none.yaml"):
        with pytest.raises(DataError, match=f"{name}: cannot be read: .*\n  Give a data_config.yaml"):
            sources_of(SourceRecipe(path=str(tmp_path / name)), "chat")
    (tmp_path / "config.yaml").write_text("data: [{token: hf_" + "a" * 30 + "}]")
    with pytest.raises(RecipeError, match="a token or password does not belong here"):
        sources_of(SourceRecipe(path=str(tmp_path / "config.yaml")), "chat")


def test_settings_beside_a_list(tmp_path):
    read(tmp_path, entry())
    with pytest.raises(DataError, match="shuffle beside a list of sources\n  Write it into the list's entries"):
        sources_of(SourceRecipe(path=str(tmp_path / "config.yaml"), shuffle=True), "chat")


OFFICIAL = [
    *("nlvr2", "dreamsim", "contrastive_caption", "birds-to-words", "visual_story_telling", "spot-the-diff"),
    *("lrv_multi", "nextqa", "star", "llava_665k_multi", "coinstruct", "dvqa", "chartqa", "docvqa", "multi_vqa"),
    *("iconqa", "imagecode"),
]


def test_the_official_mixes():
    found, notices = sources_of(SourceRecipe(path=str(recipes_dir() / "data/mantis_instruct.yaml")), "chat")
    assert [source.name for source in found] == OFFICIAL and {source.path for source in found} == {INSTRUCT}
    assert {s.name: s.max_size for s in found if s.max_size} == {"coinstruct": 100_000, "dvqa": 30_000}
    assert {s.name: s.max_num_images for s in found if s.max_num_images} == {"visual_story_telling": 20}
    assert notices == []
    assert sources_of(SourceRecipe(path="mantis_instruct.yaml"), "chat") == (found, [])
    idefics3, notices = sources_of(SourceRecipe(path="mantis_instruct_idefics3.yaml"), "chat")
    assert [source.name for source in idefics3] == [
        name for name in OFFICIAL if name not in ("visual_story_telling", "imagecode")
    ]
    few = {s.name: s.max_num_images for s in idefics3 if s.max_num_images}
    assert few == {"contrastive_caption": 6, "lrv_multi": 6} and notices == []


def test_the_original_lists_load_unchanged(tmp_path):
    """As upstream writes them: the same keys and values, quotes and comments."""
    text = "data:\n"
    for name in OFFICIAL:
        text += f'  -\n    name: "{name}"    \n    type: huggingface\n    path: "{INSTRUCT}"\n    format: chat\n'
        text += "    split: train\n    shuffle: true\n    max_size: 100000 # 150K original\n    revision: script\n"
    (tmp_path / "mantis_instruct.yaml").write_text(text)
    found, notices = sources_of(SourceRecipe(path=str(tmp_path / "mantis_instruct.yaml"), weight=2), "chat")
    assert [source.name for source in found] == OFFICIAL and notices == [SCRIPT] * 17
    assert {(s.max_size, s.shuffle, s.revision, s.weight) for s in found} == {(100_000, True, None, 2.0)}


# How often each source comes.


@given(st.lists(st.tuples(st.integers(1, 400_000), st.sampled_from([0.1, 0.5, 1.0, 2.0])), min_size=1, max_size=17))
def test_epochs_are_as_long_as_upstreams(sources):
    rows, weights = zip(*sources, strict=True)
    often = [round(count * weight) for count, weight in sources]
    if not sum(often):
        return
    roots = sum(map(sqrt, often))
    for count, coming, weight in zip(rows, often, by_square_root(rows, weights), strict=True):
        expected = int(sum(often) * min(1.1 * sqrt(coming) / roots, 1))
        assert int(weight) * count + round(count * (weight - int(weight))) == expected


def test_balance_by_hand():
    """400, 100 and 25 rows: roots 20, 10 and 5, so 525 x 1.1 x 20/35 = 330, 165 and 82.5."""
    assert isqrt(400) + isqrt(100) + isqrt(25) == 35
    weights = by_square_root([400, 100, 25], [1.0] * 3)
    assert [round(n * w) for n, w in zip([400, 100, 25], weights, strict=True)] == [330, 165, 82]
    assert by_square_root([7], [1.0]) == [1.0]  # no larger than all
    assert by_square_root([0, 9], [3.0, 1.0]) == [3.0, 1.0]


def test_balanced_epochs(tmp_path):
    """Large sources show another part each epoch, small ones come whole and then some again."""
    sizes = {"large": 40, "small": 4}
    paths = [write_rows(tmp_path / f"{n}.jsonl", [chat(f"{n} {i}", "x") for i in range(k)]) for n, k in sizes.items()]
    data = DataRecipe(sources=[SourceRecipe(path=path) for path in paths], balance="sqrt")
    samples = prepare(data, OFF, by_size()).train
    roots = sqrt(40) + sqrt(4)
    lengths = [int(44 * 1.1 * sqrt(n) / roots) for n in (40, 4)]
    assert lengths == [36, 11]
    epochs = [np.concatenate(pack_epoch(samples, OFF, epoch)) for epoch in range(3)]
    for drawn in epochs:
        counts = np.bincount(drawn, minlength=44)
        assert [counts[:40].sum(), counts[40:].sum()] == lengths
        assert counts[:40].max() == 1 and sorted(counts[40:]) == [2, 3, 3, 3]
    left_out = [set(range(40)) - set(drawn.tolist()) for drawn in epochs]
    assert all(len(left) == 4 for left in left_out) and left_out[0] != left_out[1] != left_out[2]


def test_sample_ratio_keeps_pairs(tmp_path):
    """Up-sampled and down-sampled rows come whole: each with its own pictures."""
    rows = [chat(f"row {i} <image>", "x", images=(i,)) for i in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    entries = [{"path": path, "type": "jsonl", "format": "chat", "sample_ratio": ratio} for ratio in (2.5, 0.5)]
    (tmp_path / "mix.yaml").write_text(json.dumps({"data": entries}))
    data = DataRecipe(sources=[SourceRecipe(path=str(tmp_path / "mix.yaml"))])
    samples = prepare(data, OFF, by_size()).train
    drawn = np.concatenate(pack_epoch(samples, OFF))
    assert np.bincount(samples.source[drawn]).tolist() == [10, 2]
    for at in drawn:
        sample = samples[at]
        number = sample.turns[0].content[0].split()[1]
        assert sample.images[0].source.name == f"rows-{number}-0.png"


def test_short_names():
    assert SHORT == {"mantis-instruct": INSTRUCT}
