"""The page of a check: what it says is what the check found, it stays small, and a browser shows it and asks nobody."""

import re

import numpy as np
import PIL.Image
import pytest
from browser import NASTY, Page, browsed, needs_browser
from clips_made import make
from helpers import chat, recipe, write_rows

from mantis_lite.data.encode import IGNORE
from mantis_lite.errors import SampleError
from mantis_lite.report import page as pages
from mantis_lite.report.check import check
from mantis_lite.report.fit import fit
from mantis_lite.report.page import histogram, write_check_page


@pytest.fixture
def written(llava_folder, tmp_path):
    """The page of the rows in a file, and the check that it is of."""

    def write(path: str, decode=True, **settings) -> tuple[Page, str, object]:
        asked = recipe(llava_folder, **{"data": path, "packing": {"max_length": 2_000}} | settings)
        found = check(asked, decode)
        write_check_page(found, asked, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text()
        return Page(text), text, found

    return write


def rows_of(count: int, said: str = "It is a dog.", **more) -> list[dict]:
    return [
        chat(f"Is <image> number {at}?", said + " So." * at, images=(at,), id=str(at), **more) for at in range(count)
    ]


def test_what_is_marked_is_what_trains(written, tmp_path):
    page, text, found = written(write_rows(tmp_path / "rows.jsonl", rows_of(3)))
    encoder, samples = found.encoder, found.prepared.train
    for article, mark, sample in zip(page.texts["article"], page.texts["mark"][1:], samples, strict=True):
        encoded = encoder.encode(sample)
        loss = encoded.labels[encoded.labels != IGNORE]
        assert mark == encoder.tokenizer.decode(loss.tolist(), skip_special_tokens=False)
        (start, end), tokens = encoded.spans[0], len(encoded)
        assert f"{tokens:,} tokens, {len(loss)} with loss, 1 picture\n" in article
        assert article.count(f"[picture: {end - start} tokens]") == 1
    links = page.having("img", "src")
    assert len(links) == 3 and all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert f"{len(found.outlook.schedule.packs)}" in text and "none rejected" in text


def test_rejected_rows_are_there_with_their_remedy(written, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*rows_of(3), {"id": "<b>bad</b>", "images": []}])
    (tmp_path / "rows-1-0.png").write_bytes(b"no")
    page, text, found = written(path)
    assert len(found.prepared.rejects) == 2
    shown = "".join(page.texts["dl"])
    for reject in found.prepared.rejects:
        assert f'{reject.where} (id "{reject.sample_id}")' in shown and f"{reject.found}\n{reject.remedy}" in shown
    assert "2 rejected" in text and len(page.texts["article"]) == 2


def test_rows_of_which_none_is_sound_have_a_page(written, tmp_path):
    page, text, found = written(write_rows(tmp_path / "rows.jsonl", [{"id": "bad", "images": []}] * 2))
    assert found.outlook is None and "Rejected: 2" in text and "article" not in page.texts


def test_with_headers_alone_a_picture_that_breaks_is_told_in_its_place(written, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(3))
    file = tmp_path / "rows-1-0.png"
    file.write_bytes(file.read_bytes()[:-600])
    page, _, found = written(path, decode=False)
    assert not found.prepared.rejects
    with pytest.raises(SampleError) as raised:
        found.encoder.encode(found.prepared.train[1])
    assert f"{raised.value.found}\n{raised.value.remedy}" in page.texts["article"][1]
    assert len(page.having("img", "src")) == 2


def test_a_clip_is_shown_as_its_frames(written, tmp_path):
    make(tmp_path / "a.mp4")
    rows = [chat("<video>What?", "Blocks.", video="a.mp4")]
    page, _, _ = written(write_rows(tmp_path / "rows.jsonl", rows), task="video", media={"num_frames": 4})
    assert len(page.having("img", "src")) == 4 and "4 pictures" in page.texts["article"][0]


@pytest.mark.parametrize(
    "problem, labels, target, chart",
    [
        ("single_label", ["<i>cat", "dog", "dog"], "<i>cat", "<i>cat1"),
        ("multi_label", [["a"], ["a", "b"], ["b"]], "a 1, b 0", "a2"),
        ("regression", [{"good": 0.5}, {"good": 1}, {"good": 1}], "good 0.5", "0.958 to 12"),
    ],
)
def test_labels_are_shown_and_counted(written, tmp_path, problem, labels, target, chart):
    rows = [{"prompt": "How is <image>?", "labels": label} for label in labels]
    rows = [row | {"images": other["images"]} for row, other in zip(rows, rows_of(3), strict=True)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    page, _, _ = written(path, task="classify", head={"problem": problem})
    assert f"\nto be scored {target}<|begin_of_text|>" in page.texts["article"][0] and "mark" not in page.texts
    assert chart in page.texts["section"][3].replace("\n", "")


def test_quick_tells_the_target_of_the_sample_that_it_shows(written, tmp_path):
    rows = [{"prompt": "How is <image>?", "labels": label} for label in ("cat", "dog", "dog")]
    rows = [row | {"images": other["images"]} for row, other in zip(rows, rows_of(3), strict=True)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows-0-0.png").write_bytes((tmp_path / "rows-0-0.png").read_bytes()[:-600])
    _, _, found = written(path, decode=False, task="classify", head={"problem": "single_label"})
    assert found.outlook.sample.where == "rows.jsonl:2" and found.outlook.target == "dog"


def test_charts_count_every_row_and_pack(written, tmp_path):
    _, text, found = written(write_rows(tmp_path / "rows.jsonl", rows_of(60)), packing={"max_length": 700})
    numbers = re.findall(r"</div></div><span>([\d,]+)</span>", text)
    packs = found.outlook.packs
    assert sum(map(int, numbers)) == 60 + 60 + packs
    widths = [float(each) for each in re.findall(r'<i class="h\d" style="width: ([\d.]+)%"', text)]
    drawn = found.outlook.schedule.packs[: min(packs, pages.MOST_PACKS)]
    tokens = found.prepared.train.lengths[drawn.samples, 0]
    np.testing.assert_allclose(np.array(widths), tokens / 7, atol=0.001)


def test_memory_is_what_fit_says(written, llava_folder, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(20))
    page, _, _ = written(path)
    file = tmp_path / "recipe.yaml"
    words = [f"model={llava_folder}", f"data={path}", "packing.max_length=2000", "memory.kernels=off"]
    file.write_text("method: lora\nrun_dir: unused\n")
    total = fit(str(file), words).estimate.total
    assert f"in all{total / (1 << 30):.2f} GiB" in page.texts["tfoot"][0]
    _, text, _ = written(path, memory={"fit": "auto"})
    assert "memory.fit=auto picks for a card" in text


@pytest.mark.parametrize(
    "values, bars",
    [
        ([3, 3, 5], [("3", 2), ("4", 0), ("5", 1)]),
        ([0.5, 0.5], [("0.5", 2)]),
        ([1_000_000], [("1,000,000", 1)]),
        ([0, 1, 22], [("0 to 1", 2), *((f"{at} to {at + 1}", 0) for at in range(2, 22, 2)), ("22", 1)]),
        ([0, 1, 23], [("0 to 1", 2), *((f"{at} to {at + 1}", 0) for at in range(2, 22, 2)), ("22 to 23", 1)]),
    ],
)
def test_bars_of_a_histogram(values, bars):
    assert [(bar.name, bar.rows) for bar in histogram(np.array(values))] == bars


def test_a_page_has_room_for_so_much(written, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    path = write_rows(tmp_path / "rows.jsonl", [*rows_of(30), *[{"id": "bad" * 50, "images": []}] * 20])
    for at in range(30):
        PIL.Image.fromarray(noise).save(tmp_path / f"rows-{at}-0.png")
    page, text, _ = written(path)
    shown = pages.FIRST + pages.LONGEST + pages.RANDOM
    assert len(page.texts["article"]) == shown and f"{30 - shown} samples are not shown" in text
    again = written(path)[1]
    assert again == text
    monkeypatch.setattr(pages, "ROOM", 100_000)
    monkeypatch.setattr(pages, "REJECTS_ROOM", 3_000)
    monkeypatch.setattr(pages, "MOST_PACKS", 1)
    page, small, _ = written(path, packing={"max_length": 500})
    shown = len(page.texts["article"])
    assert 3 <= shown < 24 and f"{30 - shown} samples are not shown" in small
    left = [int(each) for each in re.findall(r"and (\d+) more of these, for which", small)]
    assert len(left) == 3 and sum(left) == 24 - shown
    listed = small.count('class="found"')
    assert 0 < listed < 20 and f"and {20 - listed} more, for which the page has no room" in small
    assert "The first 1 of " in small and len(small) < 400_000


def test_text_takes_the_room_that_it_is_written_in(written, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", [chat("Hi", "<" * 3_000)])
    monkeypatch.setattr(pages, "ROOM", 11_000)
    page, text, _ = written(path, packing={"max_length": 4_000})
    assert "article" not in page.texts and "and 1 more of these, for which the page has no room" in text
    monkeypatch.setattr(pages, "ROOM", 13_000)
    assert len(written(path, packing={"max_length": 4_000})[0].texts["article"]) == 1


def test_pictures_beyond_those_drawn_keep_their_place(written, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MOST_PICTURES", 2)
    rows = [chat("<image><image><image>?", "Three.", images=(0, 1, 2))]
    page, _, _ = written(write_rows(tmp_path / "rows.jsonl", rows))
    assert len(page.having("img", "src")) == 2 and page.texts["article"][0].count("[picture: ") == 3


@needs_browser
def test_a_browser_shows_it_and_asks_nobody(written, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*rows_of(2, NASTY, more=NASTY), {"id": NASTY, NASTY: 1, "images": []}])
    page, text, _ = written(path)
    document, log, asked = browsed((tmp_path / "page.html").as_uri(), tmp_path)
    seen = Page(document)
    assert "CONSOLE" not in log and not asked
    assert [tag for tag, _ in seen.tags] == [tag for tag, _ in page.tags]
    assert seen.texts["title"][0].startswith("check: ") and NASTY in seen.texts["mark"][1]
    assert {tag for tag, _ in seen.tags}.isdisjoint({"script", "iframe", "object", "form"})
    # The same page would be caught if it let in what rows say.
    unsafe = re.sub("<meta http-equiv.*?>", "", text).replace("</h1>", '</h1><img src="http://127.0.0.1:9/x">')
    (tmp_path / "unsafe.html").write_text(unsafe + "<script>document.title = 'taken'; nothing()</script>")
    document, log, asked = browsed((tmp_path / "unsafe.html").as_uri(), tmp_path)
    assert "CONSOLE" in log and asked == {"http://127.0.0.1:9/x"} and Page(document).texts["title"] == ["taken"]
