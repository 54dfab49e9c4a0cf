"""The bench of faults: what it measures here holds, and its forks answer for the job that was asked."""

import json
import multiprocessing

import pytest

from benchmarks import saves
from benchmarks.forks import Forks
from benchmarks.sides import Side


@pytest.mark.slow
def test_an_answer_that_nobody_waited_for_is_not_taken_for_another():
    with Forks() as forks:
        given_up = {"number": next(forks.numbers), "settings": {}, "stock": True}
        forks.process.stdin.write(json.dumps(given_up) + "\n")
        done = forks({})
        assert done["status"] == 2 and "RecipeError" in done["said"]
    with pytest.raises(ValueError, match="closed"):
        forks({})


@pytest.mark.slow
def test_both_sides_train_and_note_where_they_are(tmp_path):
    with Forks() as forks:
        for stock in (True, False):
            side = Side(forks, tmp_path / str(stock), stock)
            side.folder.mkdir()
            assert side("run", rows=4, progress=str(tmp_path / "notes"))["status"] == 0
            assert len(side.losses("run")) == 1
        assert (tmp_path / "notes").read_text().split() == ["begin", "0", "step", "1", "saved", "1"] * 2


@pytest.mark.slow
def test_a_save_that_ends_at_any_system_call_leaves_one_that_is_whole(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(saves.measure, (False, tmp_path))
    calls = found["calls"]
    if "skipped" in calls:
        pytest.skip(calls["skipped"])
    assert calls["boundaries"] > 60 and {"write", "fsync", "rename", "unlinkat"} <= calls["by_call"].keys()
    for end in saves.ENDS:
        assert calls[end]["outcomes"] == {"whole": calls["boundaries"]}
    assert set(calls["killed"]["exit_codes"]) == {-9}
    assert set(calls["ENOSPC"]["exit_codes"]) == set(calls["EIO"]["exit_codes"]) == {0, 6}
