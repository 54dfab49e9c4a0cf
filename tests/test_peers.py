"""Other trainers beside this one: what a case tells of its rounds, and what the table makes of it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks import results
from benchmarks.peers import __main__ as peers
from benchmarks.peers import rows, table
from benchmarks.peers.cases import CASES, NAMES, PACKAGES, SINGLE, Case
from benchmarks.peers.worker import said

PEERS = Path(peers.__file__).parent
SIDE = 28
"""A picture has 4 tokens."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What packs of drawn rows, and a case that cannot train, told the harness; the folder; and the setting."""
    folder = tmp_path_factory.mktemp("peers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "EXAMPLES", folder / "none.json")
        told = peers.setting(folder, 3, threads=1, side=SIDE)
    cases = [Case("ours", "packed", {"packing": True}), Case("ours", "a mistake", {"packing": "what"})]
    return peers.measured(cases, folder, told, rounds=1), folder, told


def plain(folder: Path) -> tuple[int, float]:
    """Tokens with loss and their mean loss by transformers' own processor and model, all rows padded to one batch."""
    found = json.loads((folder / "parts.json").read_text())
    for row in found:
        pictures = iter(row["images"])
        parts = [part for turn in row["messages"] for part in turn["content"]]
        for part in parts:
            if part["type"] == "image":
                part["path"] = next(pictures)
    batch = AutoProcessor.from_pretrained(folder / "model").apply_chat_template(
        [row["messages"] for row in found],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
    )
    labels = batch["input_ids"].masked_fill(torch.as_tensor(batch.pop("assistant_masks")) == 0, -100)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        return int((labels != -100).sum()), model(**batch, labels=labels).loss.item()


def test_a_case_has_the_tokens_and_the_loss_of_plain_transformers(trained):
    found, folder, told = trained
    first = found["ours, packed"]["first"]
    labels, loss = plain(folder)
    assert first["labels"] == told["label_tokens"] == labels
    assert first["tokens"] == told["tokens"]
    assert first["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_case_tells_of_each_round(trained):
    case = trained[0]["ours, packed"]
    (later,) = case["rounds"]
    assert later["loss"] == pytest.approx(case["first"]["loss"], rel=1e-5)
    assert later["peak_mb"] >= case["first"]["peak_mb"] > 0
    assert 0 < later["preparing_seconds"] < later["seconds"]
    assert case["versions"]["torch"] == torch.__version__


def test_a_case_that_fails_says_why_and_the_others_go_on(trained):
    mistake = trained[0]["ours, a mistake"]
    assert mistake["rounds"] == []
    assert "packing.enabled" in mistake["says"]


def test_turns_are_marked_as_this_package_marks_pictures():
    row = rows.Row([Path("a"), Path("b")], [("user", "<image>one<image>"), ("assistant", "two")])
    marked = "(image 1: <Image><image></Image>)one(image 2: <Image><image></Image>)"
    assert rows.wrapped(row) == [("user", marked), ("assistant", "two")]


def test_what_a_process_says_last():
    assert said("Traceback\n  at\nValueError: no packing here\nshutting down\n") == "ValueError: no packing here"
    assert said("loading\nkilled\n") == "killed"
    assert said("") == "nothing"


def a_round(seconds: float, **more) -> dict:
    return {"seconds": seconds, "preparing_seconds": seconds / 10, "peak_mb": 100 * seconds, **more}


def a_case(loss: float = 2.0, labels: int = 40, tokens: int = 200, seconds=(1.0, 2.0, 4.0), begun="now") -> dict:
    told = {"loss": loss, "labels": labels, "tokens": tokens, "trained": 39_424}
    return {
        "begun": begun,
        "versions": {"ms-swift": "4.6.0", "mantis-lite": "0.1.0"},
        "first": a_round(9.0, **told),
        "rounds": [a_round(each, **told) for each in seconds],
    }


SETTING = {"rows": 8, "from": "drawn rows", "pictures": 9, "tokens": 160, "label_tokens": 40, "threads": 2}


def test_rates_are_of_the_rounds_and_the_peak_of_the_first_as_well():
    found = table.summary(a_case(), SETTING)
    assert found["samples"] == (4.0, 2.0, 8.0)
    assert found["label_tokens"] == (20.0, 10.0, 40.0)
    assert found["inputs"] == (40.0, 20.0, 80.0)
    assert found["padding"] == pytest.approx(0.2)
    assert found["with_loss"] == 0.25
    assert found["peak_mb"] == 900


@pytest.mark.parametrize(
    "case, words",
    [
        (a_case(2.00001), "the same"),
        (a_case(2.02), "off by 1.0%"),
        (a_case(labels=160), "of other tokens"),
    ],
)
def test_a_loss_is_compared_over_the_same_tokens(case, words):
    figures = {"setting": SETTING, "cases": {f"ours, {SINGLE}": a_case(), "swift, 1 row": case}}
    assert table.agreement(case, figures) == words


@pytest.mark.parametrize(
    "case, words",
    [
        (a_case(), "1.00 (1.00-1.00)"),
        (a_case(seconds=(2.0, 3.0, 5.0)), "1.50 (1.25-2.00)"),
        (a_case(seconds=(5.0, 2.0, 1.0)), "1.00 (0.25-5.00)"),
        (a_case(begun="before"), "not compared"),
    ],
)
def test_times_are_compared_turn_by_turn(case, words):
    assert table.against_packs(case, {"cases": {"ours, packed": a_case()}}) == words
    assert table.against_packs(case, {"cases": {"ours, packed": a_case() | {"says": "killed"}}}) == "not compared"
    assert table.against_packs(case, {"cases": {}}) == "not compared"


def test_the_table_has_what_a_tool_says_that_does_not_train():
    refused = {"versions": {"ms-swift": "4.6.0"}, "rounds": [], "first": None, "says": "ValueError: not here"}
    measured = {"date": "2026-01-01", "device": "a CPU", "versions": {"torch": "2"}}
    figures = {"setting": SETTING, "cases": {"ours, 1 row": a_case(), "swift, packing": refused}}
    found = list(table.lines(measured | {"figures": figures}))
    assert found[0].endswith("; 39,424 parameters train. Median (lowest-highest) of 3 rounds.")
    assert found[-2].startswith("| mantis_lite 0.1.0 | 1 row | 4.00 (2.00-8.00) | not compared | 20.0 (10.0-40.0) |")
    assert found[-1] == '| ms-swift 4.6.0 | packing | does not train: "not here" | | | | | | | |'
    late = {"setting": SETTING, "cases": {"ours, 1 row": a_case(), "swift, packing": a_case() | {"says": "killed"}}}
    assert 'does not train: "killed"' in list(table.lines(measured | {"figures": late}))[-1]
    assert len({line.count("|") for line in found[2:]}) == 1


def test_what_is_measured_again_takes_its_place(tmp_path):
    file, told = tmp_path / "peers.json", dict(SETTING)
    file.write_text(json.dumps({"figures": {"setting": told, "cases": {"ours, 1 row": 1, "trl, 1 row": 2}}}))
    assert peers.merged(told, {"trl, 1 row": 3}, file)["cases"] == {"ours, 1 row": 1, "trl, 1 row": 3}
    assert peers.merged(told | {"rows": 9}, {"trl, 1 row": 3}, file)["cases"] == {"trl, 1 row": 3}


def test_the_readme_has_what_was_measured():
    measured = json.loads((results.FOLDER / "peers.json").read_text())
    assert "\n".join(table.lines(measured)) in (PEERS / "README.md").read_text()
    assert measured["figures"]["cases"].keys() == {case.name for case in CASES}


def test_each_tool_has_a_name_and_a_program():
    tools = {case.tool for case in CASES}
    assert (
        tools == NAMES.keys() == PACKAGES.keys() == {file.name[: -len("_case.py")] for file in PEERS.glob("*_case.py")}
    )
