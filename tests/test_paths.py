"""Files that rows name lie in the data's folder, however their paths are spelt; all else is refused by row."""

import json
import os
import pickle
import re
import socket
from pathlib import Path

import pytest
from helpers import picture

from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.schema import parse
from mantis_lite.data.source import open_source
from mantis_lite.errors import DataError, SampleError
from mantis_lite.recipe import SourceRecipe

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with pictures in it and beside it, and with links, pipes and devices."""
    data = tmp_path / "data"
    for folder in ("data/pics/deep", "data/frames", "data/far_frames", "data/odd_frames", "data_evil", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("data/a.png", "data/pics/b.png", "data/frames/1.png", "data_evil/a.png", "elsewhere/c.png", "s.png"):
        (tmp_path / name).write_bytes(picture(1))
    for name, target in {
        "out.png": "../s.png",
        "absolute.png": str(tmp_path / "s.png"),
        "again.png": "out.png",
        "out": "../elsewhere",
        "evil": "../data_evil",
        "up": "..",
        "pics/up": "../..",
        "loop": "loop",
        "dangling.png": "../nothing.png",
        "proc": "/proc/self",
        "zero.png": "/dev/zero",
        "far": "../far_frames",
        "far_frames/1.png": "../../s.png",
        "odd_frames/1.png": "/dev/null",
        "in.png": "pics/b.png",
        "in": "pics",
    }.items():
        (data / name).symlink_to(target)
    os.mkfifo(data / "pipe.png")
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(data)  # a socket's path is short
        unix.bind("socket.png")
    monkeypatch.chdir(tmp_path)  # no file is found by way of it
    return data


def row(name, task: str = "chat") -> dict:
    media = {"video": name} if task == "video" else {"images": [name]}
    return {"id": "7", "messages": TURNS} | media


def read(data: Path, name, task: str = "chat", outside: bool = False, **settings):
    """The sample of a data file's only row, as a run reads it."""
    (data / "train.json").write_text(json.dumps([row(name, task)]))
    return open_source(SourceRecipe(path=str(data / "train.json"), **settings), task, outside).sample(0)


OUT, PIPE, WINDOWS, LINK, TILDE = "leads out of", "a pipe or device", "a path of Windows", "is a link", "a path from ~"
VECTORS = {
    "/etc/passwd": OUT,
    "//etc/passwd": OUT,
    "///etc/passwd": OUT,
    "/": OUT,
    "../s.png": OUT,
    "../../../../../../../../etc/passwd": OUT,
    "pics/../../s.png": OUT,
    "pics/deep/../../../s.png": OUT,
    "./../s.png": OUT,
    "nothing/../../s.png": OUT,
    "a.png/../../s.png": OUT,
    "..": OUT,
    "../": OUT,
    "pics/../..": OUT,
    "../data_evil/a.png": OUT,
    "{data}_evil/a.png": OUT,
    "{data}/../s.png": OUT,
    "{data}/../data_evil/a.png": OUT,
    "{data}/../none.png": OUT,
    "out.png": OUT,
    "absolute.png": OUT,
    "again.png": OUT,
    "out/c.png": OUT,
    "evil/a.png": OUT,
    "up/s.png": OUT,
    "up/data_evil/a.png": OUT,
    "pics/up/s.png": OUT,
    "in/up/s.png": OUT,
    "in/../../s.png": OUT,
    "out/none.png": OUT,
    "proc/environ": OUT,
    "proc/cwd/s.png": OUT,
    "proc/root/etc/passwd": OUT,
    "/proc/self/environ": OUT,
    "/proc/self/fd/0": OUT,
    "/dev/zero": OUT,
    "/dev/stdin": OUT,
    "/sys/kernel/uevent_seqnum": OUT,
    "zero.png": OUT,
    "pipe.png": PIPE,
    "socket.png": PIPE,
    "pics": "is a folder",
    "pics/": "is a folder",
    ".": "is a folder",
    "": "is an empty path",
    "a.png\0": "is no path: embedded null byte",
    "../s.png\0.png": "is no path: embedded null byte",
    "\0": "is no path: embedded null byte",
    "\ud800.png": "is no path: .*surrogates not allowed",
    "~/s.png": TILDE,
    "~root/s.png": TILDE,
    "..\\s.png": WINDOWS,
    "pics\\b.png": WINDOWS,
    "C:\\s.png": WINDOWS,
    "C:/s.png": WINDOWS,
    "c:s.png": WINDOWS,
    "\\\\host\\share\\s.png": WINDOWS,
    "\\\\?\\C:\\s.png": WINDOWS,
    "//host/share/s.png": OUT,
    "file:///etc/passwd": LINK,
    "FILE:///etc/passwd": LINK,
    "file:/etc/passwd": LINK,
    "file://localhost/etc/passwd": LINK,
    "http://127.0.0.1/s.png": LINK,
    "https://example.org/s.png": LINK,
    "ftp://example.org/s.png": LINK,
    "pics/../http://example.org": LINK,
    "view-source:https://example.org": LINK,
    "gopher:/x": LINK,
    "data:text/plain,abc": "a data: URI without ;base64",
}
assert len(VECTORS) >= 40


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(data, name):
    with pytest.raises(SampleError) as caught:
        read(data, name.format(data=data))
    found, remedy = str(caught.value).split("\n  ")
    pattern = rf'^train.json:1 \(id "7"\): "images"\[0\] .*{VECTORS[name]}'
    assert re.search(pattern, found) and remedy.endswith(".")


HARMLESS = {
    "%2e%2e/s.png": "%2e%2e/s.png",
    "..%2fs.png": "..%2fs.png",
    "\uff0e\uff0e/s.png": "\uff0e\uff0e/s.png",
    "...": "...",
    ".../s.png": ".../s.png",
    "$HOME/s.png": "$HOME/s.png",
    "s.png": "s.png",
    "x" * 300: "x" * 300,
    "loop": "loop",
    "loop/x": "loop/x",
}
"""Names that lead nowhere: the row is read, and the missing file is told when it is opened."""


@pytest.mark.parametrize("name", HARMLESS)
def test_names_that_lead_nowhere(data, name):
    (found,) = read(data, name).images
    assert found.source == data / HARMLESS[name] and not os.path.exists(found.source)


def test_a_link_to_nothing_is_judged_by_where_it_leads(data):
    with pytest.raises(SampleError, match=OUT):
        read(data, "dangling.png")


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "./a.png",
        "pics/b.png",
        "pics//b.png",
        "pics/./b.png",
        "pics/../a.png",
        "{data}/a.png",
        "{data}/pics/../a.png",
        "../data/a.png",
        "in.png",
        "in/b.png",
        "up/data/a.png",
    ],
)
def test_files_in_the_folder_are_read_by_any_path(data, name):
    (found,) = read(data, name.format(data=data)).images
    assert found.source.read_bytes() == picture(1)


def test_the_folder_may_itself_be_a_link(data, tmp_path):
    (tmp_path / "linked").symlink_to("data")
    for name in ("a.png", f"{data}/a.png", f"{tmp_path}/linked/a.png"):
        assert read(tmp_path / "linked", name).images[0].source.read_bytes() == picture(1)
    with pytest.raises(SampleError, match=OUT):
        read(tmp_path / "linked", "../s.png")


def test_frames_of_a_clip_lie_in_the_folder_too(data):
    assert read(data, "frames", "video").videos[0].source == data / "frames"
    assert read(data, "frames/", "video").videos[0].source == data / "frames"
    for name, found in {
        "far_frames": OUT,
        "far": OUT,
        "odd_frames": OUT,
        "out": OUT,
        "..": OUT,
        "pipe.png": PIPE,
    }.items():
        with pytest.raises(SampleError, match=rf'"video" .*{found}'):
            read(data, name, "video")
    with pytest.raises(SampleError, match="a folder with 'up' in it"):
        (data / "pics/up").unlink()
        (data / "pics/up").mkdir()
        read(data, "pics", "video")
    with pytest.raises(SampleError, match=r"frame 2 of .* leads out of"):
        read(data, [["a.png", "../s.png"]], "video")
    with pytest.raises(SampleError, match=r'"video" is a link .*\n  Download the clip and give the file\'s path.$'):
        read(data, "https://example.org/a.mp4", "video")


def test_media_dir_is_the_folder_then(data, tmp_path):
    inside = read(data, "c.png", media_dir=str(tmp_path / "elsewhere"))
    assert inside.images[0].source == tmp_path / "elsewhere/c.png"
    for name in ("../data/a.png", f"{data}/a.png"):
        with pytest.raises(SampleError, match=f"leads out of {tmp_path}/elsewhere"):
            read(data, name, media_dir=str(tmp_path / "elsewhere"))
    assert read(data, f"{data}/../s.png", media_dir="/").images[0].source.read_bytes() == picture(1)
    with pytest.raises(
        DataError, match=r"nowhere: media_dir is no such folder\n  Name the folder of the files, or a .zip"
    ):
        read(data, "a.png", media_dir=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"s.png: media_dir is neither a folder nor an archive\n  Name the folder"):
        read(data, "a.png", media_dir=str(tmp_path / "s.png"))


@pytest.mark.parametrize("name", ["{data}/../s.png", "../s.png", "out.png", "out/c.png", "../data_evil/a.png", "a.png"])
def test_outside_lets_rows_name_any_file(data, name):
    assert read(data, name.format(data=data), outside=True).images[0].source.read_bytes() == picture(1)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/proc/self/environ", OUT),
        ("proc/environ", OUT),
        ("/sys/kernel/uevent_seqnum", OUT),
        ("/dev/zero", PIPE),
        ("zero.png", PIPE),
        ("pipe.png", PIPE),
        ("/etc", "a folder"),
        ("~/s.png", TILDE),
        ("https://example.org/s.png", LINK),
    ],
)
def test_not_even_outside(data, name, found):
    with pytest.raises(SampleError, match=found):
        read(data, name, outside=True)


def test_rows_without_a_folder(data, monkeypatch):
    """As those of the hub are: the working directory is no folder of theirs."""
    monkeypatch.chdir(data)
    found = r'rows:1 \(id "7"\): "images"\[0\] is a path without a folder to start at \(\'a.png\'\)\n  Set media_dir'
    for root in (MediaFolder(), MediaFolder(outside=True)):
        with pytest.raises(SampleError, match=found):
            parse(row("a.png"), "rows:1", root)
    with pytest.raises(SampleError, match=r"is a path of this machine .*\n  Set media_dir .* data.outside=true."):
        parse(row(str(data / "a.png")), "rows:1", MediaFolder())
    assert parse(row(str(data / "a.png")), "rows:1", MediaFolder(outside=True)).images[0].source == data / "a.png"


def test_a_folder_is_looked_at_once(data, monkeypatch):
    """Hundreds of thousands of rows are read before a run."""
    folder, asked = MediaFolder(data), []
    for name in ("os.path.realpath", "os.scandir", "os.lstat", "os.stat"):
        real = getattr(os.path if "path." in name else os, name.rpartition(".")[2])
        monkeypatch.setattr(name, lambda path, *more, real=real, name=name: asked.append(name) or real(path, *more))
    for at in range(100):
        assert folder.find(f"pics/{at}.png", "x", "picture") == data / f"pics/{at}.png"
        assert folder.find("a.png", "x", "picture") == data / "a.png"
    assert asked.count("os.scandir") == 2
    assert asked.count("os.path.realpath") == 3  # and the folder's own
    assert len(asked) <= 40
    assert pickle.loads(pickle.dumps(folder)) == folder
