"""benchmarks/README.md says what benchmarks/results/ holds, of everything that `make bench` runs."""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from mantis_lite.data.collate import collate
from mantis_lite.data.encode import Encoded

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import packed, planning, results, scaling, table

MAKEFILE = Path(__file__).parents[1] / "Makefile"


def of_make_bench() -> list[str]:
    """The modules that `make bench` runs, in order."""
    target = MAKEFILE.read_text().partition("\nbench: ")[2].partition("\n\n")[0]
    return re.findall(r"-m benchmarks\.(\w+)", target)


def test_the_page_is_what_was_measured():
    assert table.PAGE.read_text() == "\n".join(table.page(table.read())) + "\n"


def test_the_plot_is_what_was_measured(tmp_path):
    taken = json.loads((results.FOLDER / "scaling.json").read_text())
    if taken["versions"]["matplotlib"] != version("matplotlib"):
        pytest.skip("another matplotlib draws it otherwise")
    table.plot(taken["figures"], tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").read_bytes() == table.PLOT.read_bytes()


@pytest.mark.skipif(not MAKEFILE.is_file(), reason="runs in a checkout")
def test_what_make_bench_runs_has_rows_and_the_page_comes_last():
    *names, last = of_make_bench()
    assert len(names) >= 10 and last == "table" and set(names) <= table.ROWS.keys()
    for name in names:
        assert (
            results.FOLDER / f"{name}.json"
        ).is_file() and f"`python -m benchmarks.{name}`" in table.PAGE.read_text()


def test_a_target_that_is_missed_is_said_to_be():
    values = results.spread([2.0, 1.0, 4.0])
    assert values == {"median": 2.0, "min": 1.0, "max": 4.0, "n": 3}
    assert table.at_most("a", values, 1.9, " s") == table.Row("a", "2 s (1 to 4)", "at most 1.9 s", False)
    assert table.at_least("a", values, 2).met
    taken = {"date": "", "device": "", "cpu_threads": 1, "python": ""}
    taken["versions"] = dict.fromkeys(("torch", "transformers", "trl", "tokenizers", "numpy"), "")
    rows = [table.Row("a", "2", "1", False), table.Row("b", "2", "2", True), table.Row("c", "2")]
    assert list(table.section("loss", rows, taken))[-3:] == [
        "| a | 2 | 1 | **no** |",
        "| b | 2 | 2 | yes |",
        "| c | 2 |  |  |",
    ]


def test_ways_take_turns_and_must_agree():
    order = []

    def way(name):
        order.append(name)
        return len(order) > 6

    def same(found):
        assert found[0] == found[1], "not the same"

    ways = {"a": lambda: way("a"), "b": lambda: way("b")}
    seconds = results.interleaved(ways, repeats=2, same=same)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert {name: len(of) for name, of in seconds.items()} == {
        "a": 2,
        "b": 2,
    }
    order[:] = ["c"]
    with pytest.raises(AssertionError, match="not the same"):
        results.interleaved(ways, repeats=3, same=same)


def test_every_committed_spread_is_of_five_turns_at_least():
    for name, taken in table.read().items():
        for where, values in spreads(taken["figures"], name):
            assert values["n"] >= results.REPEATS and values["min"] <= values["median"] <= values["max"], where


def spreads(figures, where):
    """Every spread in figures, with where it is."""
    if isinstance(figures, dict):
        if "median" in figures and "n" in figures:
            yield where, figures
        for key, value in figures.items():
            yield from spreads(value, f"{where}, {key}")


def test_what_padding_and_cutting_take_is_counted():
    """A row of 15 pictures and 560 tokens of text, 100 of them its answer, and five of 100 tokens."""
    lengths, images = np.array([9_200, *[100] * 5]), np.array([15, *[0] * 5])
    found = packed.wasted(lengths, images, np.array([100, *[50] * 5]))
    assert (found["rows_that_are_cut"], found["pictures_cut"]) == (1, 1)
    assert (found["supervised_tokens"], found["supervised_tokens_cut"]) == (350, 100)
    beside = (8_192 + 300) / (4 * 8_192)  # in the batch of four that the long row is in, or in none
    assert found["padding_of_batches_of_4"] in (pytest.approx(1 - beside, abs=1e-4), 0)
    assert found["fill_of_packs"] == pytest.approx((8_192 + 500) / (2 * 8_192), abs=1e-4)


def test_boundaries_and_a_mask_are_the_same_row():
    samples = [Encoded(np.arange(length) + 5, np.arange(length)) for length in (3, 1, 4)]
    mask = packed.masked(samples)["attention_mask"][0, 0].bool()
    assert torch.equal(packed.seen(collate(samples)), mask)
    assert mask.sum() == 6 + 1 + 10 and not mask[3, 2] and not mask[0, 1]


@pytest.mark.parametrize("name", planning.OTHERS)
def test_what_others_pack_with_holds_every_sample_once(name):
    pack, _ = planning.OTHERS[name]
    tokens = np.random.default_rng(0).integers(100, 3_000, 1_500)
    packs = pack(tokens)
    assert sorted(size for pack in packs for size in pack) == sorted(tokens.tolist())
    assert max(map(sum, packs)) <= planning.MAX_LENGTH
    assert len(planning.planner(tokens)) <= len(packs)


def test_a_curve_is_linear_or_not():
    seconds = {str(size): [size / 1000.0] * 5 for size in (1, 2, 4, 8)}
    assert scaling.curve([1, 2, 4, 8], seconds, "things")["linear"]
    squared = {str(size): [size * size / 1000.0] * 5 for size in (1, 2, 4, 8)}
    found = scaling.curve([1, 2, 4, 8], squared, "things")
    assert found["exponent"] == pytest.approx(2) and not found["linear"]
