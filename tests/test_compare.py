"""Two models' results side by side: intervals, what flipped, and a page of it that nothing can get into or out of."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mantis_lite.errors import DataError, RecipeError
from mantis_lite.evaluate.compare import compare, flipped
from mantis_lite.evaluate.page import write_page
from mantis_lite.evaluate.question import Result
from mantis_lite.evaluate.results import RESULTS, SUMMARY, interval, line_of, of_means, read_results, summarise

COUNT = 200


def results(right: set[int], count: int = COUNT) -> list[Result]:
    """Rows of two categories, the second a fourth of all, with letters weighed for half of them."""
    made = []
    for at in range(count):
        logprobs = {"A": -0.1, "B": -2.0} if at in right else {"A": -2.0, "B": -0.1}
        category = "few" if at % 4 == 0 else "many"
        made.append(
            Result(
                id=f"row {at}",
                category=category,
                group="",
                prompt="See <image> and tell.",
                images=("a.png",),
                answer="A",
                raw="(A)" if at in right else "(B)",
                parsed="A" if at in right else "B",
                correct=float(at in right),
                logprobs=logprobs if at % 2 else None,
            )
        )
    return made


def write(folder: Path, found: list[Result], overall: str = "rows", **more) -> Path:
    folder.mkdir()
    summary = {"benchmark": "made", "protocol": "own", "model": folder.name} | summarise(found, overall) | more
    (folder / SUMMARY).write_text(json.dumps(summary))
    (folder / RESULTS).write_text("".join(map(line_of, found)))
    return folder


def test_what_is_written_is_read(tmp_path):
    found = [replace(each, raw="\ud83d\u2028 half") for each in results({1, 2})]
    read, summary = read_results(write(tmp_path / "a", found))
    assert read == found and summary["count"] == COUNT
    again = "\n  Evaluate again, with --from-scratch"
    for line, wrong in (('{"id": 3}\n', ".*"), (line_of(found[0]), "the id row 0 is of a line before")):
        (tmp_path / "a" / RESULTS).write_text(line_of(found[0]) + line)
        with pytest.raises(DataError, match=rf"results.jsonl:2: no result: {wrong}{again}"):
            read_results(tmp_path / "a")
    (tmp_path / "a" / RESULTS).write_text(line_of(found[0]))
    (tmp_path / "a" / SUMMARY).write_text("{")
    with pytest.raises(DataError, match=f"summary.json: no summary: .*{again}"):
        read_results(tmp_path / "a")
    with pytest.raises(RecipeError, match="nowhere: no folder of results\n  Run `mantis-lite evaluate`"):
        read_results(Path("nowhere"))


def test_intervals_are_the_known_ones():
    """Wilson's, by the worked numbers of Newcombe 1998: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (right, count), bounds in known.items():
        found = interval(np.array([1.0] * right + [0.0] * (count - right)))
        assert found == pytest.approx(bounds, abs=5e-5)
    assert interval(np.array([0.5])) == (0, 1)
    low, high = interval(np.array([0.2, 0.4, 0.9]))
    assert low < 0.5 < high and high - low == pytest.approx(2 * 1.959964 * np.std([0.2, 0.4, 0.9], ddof=1) / 3**0.5)


def test_a_summary_by_category():
    right = set(range(0, COUNT, 4)) | set(range(1, 75))
    found = summarise(results(right), "categories")
    few, many = found["categories"]["few"], found["categories"]["many"]
    assert few["accuracy"] == 1 and many["accuracy"] == 56 / 150 and found["accuracy"] == (1 + 56 / 150) / 2
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert found["likelihood"]["count"] == COUNT / 2 and found["unread"] == 0
    assert summarise(results(right), "rows")["accuracy"] == len(right) / COUNT


def test_the_interval_of_a_mean_of_categories():
    """Of one it is its own, of all right no point; and as often as it says, the truth is in it."""
    one = [replace(each, category="") for each in results({1, 2, 5}, 20)]
    assert summarise(one, "categories")["interval"] == pytest.approx(summarise(one, "rows")["interval"])
    right = [replace(each, category=str(at)) for at, each in enumerate(results(set(range(5)), 5))]
    low, high = summarise(right, "categories")["interval"]
    assert high == 1 and low == pytest.approx(1 - (1 - interval(np.ones(1))[0]) / 5**0.5)
    rng, shares = np.random.default_rng(0), np.array([0.3, 0.6, 0.95])
    inside = 0
    for _ in range(1000):
        low, high = of_means([(rng.random(12) < share).astype(float) for share in shares])
        inside += low <= shares.mean() <= high
    assert 930 <= inside <= 985


@pytest.mark.parametrize("overall", ["rows", "categories"])
def test_a_gain_is_found_and_no_gain_is_none(tmp_path, overall):
    before, after = set(range(0, COUNT, 3)), (set(range(0, COUNT, 3)) - {0, 3}) | set(range(1, 100, 3))
    a, b = write(tmp_path / "a", results(before), overall), write(tmp_path / "b", results(after), overall)
    found = compare(a, b)
    assert found.accuracy.low < found.accuracy.gain < found.accuracy.high and found.accuracy.low > 0
    assert found.accuracy.verdict == "B is better" and found.accuracy.p < 0.001
    assert [one.id for one, _ in found.broken] == ["row 0", "row 3"] and len(found.fixed) == len(after - before)
    assert sum(map(sum, flipped(found).values())) == len(found.broken) + len(found.fixed)
    assert compare(b, a).accuracy.verdict == "B is worse" and compare(a, b) == found
    same = compare(a, a).accuracy
    assert (same.gain, same.low, same.high, same.p) == (0, 0, 0, 1) and same.verdict.startswith("no difference")
    assert found.likelihood and found.likelihood.gain > 0


def test_the_interval_is_that_of_resampled_rows(tmp_path):
    """As by drawing rows themselves."""
    rng = np.random.default_rng(1)
    before, after = (set(np.flatnonzero(rng.random(COUNT) < share).tolist()) for share in (0.4, 0.5))
    found = compare(write(tmp_path / "a", results(before)), write(tmp_path / "b", results(after))).accuracy
    moved = np.array([(at in after) - (at in before) for at in range(COUNT)])
    drawn = moved[rng.integers(0, COUNT, (20_000, COUNT))].mean(1)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.011)


def test_few_rows_show_nothing_though_all_moved(tmp_path):
    """Drawn again, five rows that were fixed are five rows that were fixed."""
    a, b = (write(tmp_path / name, results(right, 5)) for name, right in (("a", set()), ("b", set(range(5)))))
    found = compare(a, b).accuracy
    assert (found.low, found.high, found.p) == (1, 1, 2 / 2**5) and found.verdict.startswith("no difference")


def test_how_they_were_asked_is_told(tmp_path):
    a = write(tmp_path / "a", results({1}), scoring="generate", in_4_bits=[])
    b = write(tmp_path / "b", results({1}), scoring="likelihood", in_4_bits=["language"])
    assert compare(a, a).otherwise == {}
    found = compare(a, b)
    assert found.otherwise == {"scoring": ("generate", "likelihood"), "in_4_bits": ([], ["language"])}
    write_page(found, lambda result: [], tmp_path / "page.html")
    assert "scoring generate (A) and likelihood (B), in_4_bits" in (tmp_path / "page.html").read_text()


def test_only_the_same_questions_are_compared(tmp_path):
    a = write(tmp_path / "a", results({1}))
    with pytest.raises(RecipeError, match=r"compare: .*a is of protocol own, and .*b of upstream\n"):
        compare(a, write(tmp_path / "b", results({1}), protocol="upstream"))
    with pytest.raises(RecipeError, match="compare: no row is in both"):
        compare(a, write(tmp_path / "c", [replace(each, id=f"other {each.id}") for each in results({1})]))
    for name, other in (("answer", {"answer": "B"}), ("prompt", {"prompt": "See <image>."})):
        odd = write(tmp_path / name, [replace(e, **other) if e.id == "row 7" else e for e in results({1})])
        wrong = f"compare: 1 rows have another question or right answer in .*{name}, the first of them row 7\n"
        with pytest.raises(RecipeError, match=wrong):
            compare(a, odd)
    ways = [replace(each, prompt="<image> as one family has it") for each in results({1})]
    upstream = [write(tmp_path / f"u{at}", of, protocol="upstream") for at, of in enumerate((results({1}), ways))]
    assert compare(*upstream).count == COUNT
    found = compare(a, write(tmp_path / "e", [replace(e, id="new") if e.id == "row 7" else e for e in results({1})]))
    assert found.alone == (1, 1) and found.count == COUNT - 1


class Page(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_a_page_of_what_flipped(tmp_path):
    nasty = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"
    texts = {"prompt": f"{nasty} <image>", "raw": f"</dd>{nasty}", "answer": nasty, "parsed": nasty}
    rows = [replace(e, id=nasty + e.id, category=nasty + e.category, **texts) for e in results({1, 2, 3})]
    more = [replace(e, correct=0.25 if at == 5 else float(at in (2, 3))) for at, e in enumerate(rows)]
    found = compare(write(tmp_path / "a", rows, model=nasty), write(tmp_path / "b", more))
    pictures = lambda result: [PIL.Image.new("RGB", (900, 300), "red")]  # noqa: E731
    write_page(found, pictures, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "form"})
    assert [attrs["href"] for tag, attrs in page.tags if tag == "link"] == ["data:,"]
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2 and all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in images)
    assert all("onerror" not in attrs for _, attrs in page.tags) and "http" not in text.replace("http-equiv", "")
    assert "&lt;script&gt;" in text and "{{ 7*7 }}" in text and "B, worth 0.25" in text
    assert len([1 for tag, _ in page.tags if tag == "article"]) == 2
    assert text.index("Broken, better in A: 1") < text.index("row 1, ") < text.index("Fixed, better in B: 1")
    assert text.index("Fixed, better in B: 1") < text.index("row 5, ")
    write_page(found, pictures, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_a_page_has_room_for_so_much(tmp_path, monkeypatch):
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    monkeypatch.setattr("mantis_lite.evaluate.page.MOST_BYTES", 500_000)
    found = compare(write(tmp_path / "a", results(set())), write(tmp_path / "b", results(set(range(100)))))
    write_page(found, lambda result: [noise], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    shown = text.count("<article>")
    assert 0 < shown < 100 and f"and {100 - shown} more, for which the page has no room" in text
    assert len(text) < 600_000
    monkeypatch.setattr("mantis_lite.evaluate.page.MOST_ROWS", 20)
    write_page(found, lambda result: [], tmp_path / "few.html")
    text = (tmp_path / "few.html").read_text()
    assert text.count("<article>") == 10 and "and 90 more, for which the page has no room" in text
