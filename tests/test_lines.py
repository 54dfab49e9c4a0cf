"""A file of rows is read as Python's own json reads it, wherever its blocks end, and holds no more than places."""

import gc
import gzip
import json
import os
import pickle
import re

import pytest

from mantis_lite.data import lines as module
from mantis_lite.data.columns import Fault
from mantis_lite.data.lines import MAX_ROW, SMALL, Lines

STRANGE = [
    {"id": 1, "text": 'a "quoted" \\ backslash, ] } and \n'},
    {"é": "漢字 🙂 \u2028", "list": [[], {}, [{"a": [1, 2.5e3]}]]},
    [],
    {},
    "[",
    -12.5,
    None,
    True,
    {"long": "x" * 300},
]


@pytest.fixture(params=[1, 2, 3, 7, 64, 1 << 20])
def block(request, monkeypatch):
    """Bytes that are read at a time."""
    monkeypatch.setattr(module, "BLOCK", request.param)


def opened(tmp_path, name: str, data: bytes) -> Lines:
    (tmp_path / name).write_bytes(data)
    return Lines(tmp_path / name)


def fault_of(call, *args) -> str:
    with pytest.raises(Fault) as caught:
        call(*args)
    return f"{caught.value.found}\n  {caught.value.remedy}"


@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("escapes", [True, False])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("around", [(b"", b""), (b"\xef\xbb\xbf \r\n", b"\r\n\t ")], ids=["bare", "BOM and blanks"])
def test_a_list_is_what_json_reads(tmp_path, block, name, indent, escapes, around):
    data = around[0] + json.dumps(STRANGE, indent=indent, ensure_ascii=escapes).encode() + around[1]
    found = opened(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data)
    assert list(found) == json.loads(data.decode("utf-8-sig")) == STRANGE
    assert found.numbers.tolist() == list(range(1, len(STRANGE) + 1))
    assert list(pickle.loads(pickle.dumps(found))) == STRANGE


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_are_what_json_reads(tmp_path, block, end, last):
    data = "\ufeff" + end.join(json.dumps(row, ensure_ascii=False) for row in STRANGE) + end * last
    found = opened(tmp_path, "a.jsonl", data.encode())
    assert list(found) == STRANGE
    written = [at for at, line in enumerate(data.split("\n"), 1) if line.strip()]
    assert found.numbers.tolist() == written
    assert list(pickle.loads(pickle.dumps(found))) == STRANGE


def test_an_empty_list_and_an_empty_file_have_no_rows(tmp_path, block):
    assert len(opened(tmp_path, "a.json", b" [ ] ")) == 0
    assert len(opened(tmp_path, "a.jsonl", b" \n\n")) == len(opened(tmp_path, "b.jsonl", b"")) == 0


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "not a list of rows"),
        (b'{"a": 1}', "not a list of rows"),
        (b'[{"a": 1},\n\n   ]', "not JSON: Expecting value: line 3 column 4"),
        (b'[{"a": 1}\n {"a": 2}]', "not JSON: expected a comma, or the list's end: line 2 column 2"),
        (b'[{"a": 1,}]', "not JSON: (Illegal trailing|Expecting property name).*: line 1 column (9|10)"),
        (b'[{"a": tru}, {"a": 2}]', "not JSON: Expecting value: line 1 column 8"),
        (b'[{"a": "x\ny"}]', "not JSON: Invalid control character at: line 1 column 10"),
        (b'[{"a": 1}', "not JSON: expected a comma, or the list's end: line 1 column 10"),
        (b'[\n{"a": "x', "not JSON: Unterminated string starting at: line 2 column 7"),
        (b"[1]\n\n [2]", "not JSON: more behind the list's end: line 3 column 2"),
    ],
)
def test_what_is_no_list_is_told_by_line_and_column(tmp_path, block, data, found):
    said = fault_of(opened, tmp_path, "a.json", data)
    assert re.match(found + "\n  (Mend it there|Write it as)", said), said


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (b'{"a": NaN}', "the row is not JSON: NaN is no JSON value; write null\n  Each row is one whole JSON object"),
        (b'{"a": [-Infinity]}', "the row is not JSON: -Infinity is no JSON value; write null\n  Each row"),
        (b'{"a": "\xff"}', "the row is not UTF-8: byte 0xff at 8\n  Save the file as UTF-8."),
        (b'{"a": "\xed\xa0\xbd"}', "the row is not UTF-8: byte 0xed at 8\n  Save"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the row is not JSON: Exceeds the limit (4300 digits)"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the row has lists or objects nested too deeply\n  Each"),
    ],
    ids=["NaN", "Infinity", "Latin-1", "half a character", "digits", "depth"],
)
def test_a_bad_row_leaves_the_others(tmp_path, row, found):
    """In a list, too, but where it cannot be told where the row ends."""
    rows = opened(tmp_path, "a.jsonl", b'{"a": 1}\n' + row + b'\n{"a": 2}')
    assert (rows[0], rows[2]) == ({"a": 1}, {"a": 2})
    assert fault_of(rows.__getitem__, 1).startswith(found)
    listed = b'[{"a": 1},' + row + b',{"a": 2}]'
    if b"[[" in row:
        said = fault_of(opened, tmp_path, "a.json", listed)
        assert said.startswith("not JSON: lists or objects nested too deeply: line 1 column 11")
        return
    rows = opened(tmp_path, "a.json", listed)
    assert (rows[0], rows[2]) == ({"a": 1}, {"a": 2})
    assert fault_of(rows.__getitem__, 1).startswith(found)


def test_a_huge_row_is_refused_by_its_size(tmp_path):
    huge = b'{"a": "' + b"x" * MAX_ROW + b'"}'
    rows = opened(tmp_path, "a.jsonl", b'{"a": 1}\n' + huge + b'\n{"a": 2}')
    assert (rows[0], rows[2], rows.numbers.tolist()) == ({"a": 1}, {"a": 2}, [1, 2, 3])
    found = f"the row has {len(huge) + 1:,} bytes, more than 64 MiB\n  Write each row on a line of its own"
    assert fault_of(rows.__getitem__, 1).startswith(found)
    said = fault_of(opened, tmp_path, "a.json", b'[{"a": 1},\n' + huge[:-2])
    assert said == "not JSON: a row without an end within 64 MiB: line 2 column 1\n  Mend it there."


def test_a_packed_file_that_explodes_is_refused(tmp_path):
    def packed(size: int) -> bytes:
        return gzip.compress(b'{"a": "' + b"x" * (size - 10) + b'"}\n')

    said = fault_of(opened, tmp_path, "a.jsonl.gz", packed(SMALL + 1))
    assert said == f"unpacks to more than 100 times its size, {SMALL:,} bytes\n  Unpack it yourself, if you trust it."
    assert len(opened(tmp_path, "a.jsonl.gz", packed(SMALL))) == 1


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b"x" * 999, mtime=0)[:-9]])
def test_a_packed_file_that_is_broken(tmp_path, data):
    said = fault_of(opened, tmp_path, "a.jsonl.gz", data)
    assert said.startswith("cannot be read: ") and said.endswith(
        "\n  Make the file again, or room for what it unpacks to."
    )


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    rows = opened(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": 2}\n')
    kept = pickle.dumps(rows)
    assert rows[1] == pickle.loads(kept)[1] == {"a": 2}
    (tmp_path / "b.jsonl").write_bytes(b'{"b": 1}\n{"b": 2}\n')
    (tmp_path / "b.jsonl").rename(tmp_path / "a.jsonl")
    assert rows[1] == {"a": 2}  # the file that was opened is still that
    changed = "the file has changed since it was opened\n  Start again, and let it be until the end."
    assert fault_of(pickle.loads(kept).__getitem__, 1) == changed
    rows = Lines(tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"{}\n")
    assert fault_of(rows.__getitem__, 1) == changed


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted where Linux lists them")
def test_the_file_is_let_go_of(tmp_path):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    rows = [opened(tmp_path, "a.jsonl.gz", gzip.compress(b"{}")) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    rows.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
