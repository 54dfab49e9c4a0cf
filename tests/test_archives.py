"""Archives of pictures are unpacked once and whole; those made to write elsewhere or to explode write nothing."""

import gzip
import io
import json
import multiprocessing
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import picture

from mantis_lite.data import archives
from mantis_lite.data.archives import unpack
from mantis_lite.data.source import open_source
from mantis_lite.errors import DataError, SampleError
from mantis_lite.recipe import SourceRecipe

PNG = picture(1)
FILES = {"train_images/deep/er/a.png": PNG, "train_images/b.png": picture(2), "c d é.png": picture(3)}


def zipped(path: Path, *members: tuple, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """A .zip of (name or ZipInfo, bytes)."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def tarred(path: Path, *members: tuple) -> Path:
    """A .tar, packed where its name says so, of (name or TarInfo, bytes)."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def made(path: Path, *members: tuple) -> Path:
    return zipped(path, *members) if path.suffix == ".zip" else tarred(path, *members)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTIS_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
def test_every_kind_is_unpacked_once(tmp_path, cache, name):
    folders = ("empty/", b"") if name.endswith("zip") else (directory("empty"), b"")
    archive = made(tmp_path / name, *FILES.items(), folders)
    folder = unpack(archive)
    assert contents(folder) == FILES and folder.is_relative_to(cache)
    (folder / "train_images/b.png").write_bytes(b"kept")  # it is not unpacked again
    assert unpack(archive) == folder and (folder / "train_images/b.png").read_bytes() == b"kept"
    os.utime(archive, (1, 1))  # another archive in its place
    assert contents(unpack(archive)) == FILES


def directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info


def test_names_as_tar_writes_them(tmp_path, cache):
    archive = tarred(tmp_path / "a.tar", (directory("."), b""), (directory("./pics"), b""), ("./pics/a.png", PNG))
    assert contents(unpack(archive)) == {"pics/a.png": PNG}
    with pytest.raises(DataError, match=r"'pics/a.png' and './pics/a.png' are one file's name"):
        unpack(tarred(tmp_path / "b.tar", ("./pics/a.png", PNG), ("pics/a.png", PNG)))


@pytest.mark.parametrize("name", ["pics.zip", "pics.tar.gz"])
def test_rows_find_their_pictures_in_an_archive(tmp_path, cache, name):
    archive = made(tmp_path / name, *FILES.items())
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"image": image, "messages": turns} for image in ("train_images/deep/er/a.png", "../a.png", "none.png")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    source = open_source(SourceRecipe(path=str(tmp_path / "train.json"), media_dir=str(archive)))
    assert source.sample(0).images[0].source.read_bytes() == PNG
    with pytest.raises(SampleError, match="leads out of"):
        source.sample(1)
    assert not source.sample(2).images[0].source.exists()


def link(kind: bytes, name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def linked_zip(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def overlapping(path: Path) -> Path:
    """A thousand entries of the directory that all are the same packed bytes (Fifield 2019)."""
    content = os.urandom(100_000)
    zipped(path, ("a", content))
    raw = path.read_bytes()
    at = raw.index(b"PK\1\2")
    end = raw.index(b"PK\5\6")
    entry = raw[at:end]
    names = [f"{number:06}".encode() for number in range(1000)]
    entries = b"".join(entry[:28] + struct.pack("<H", 6) + entry[30:46] + name + entry[47:] for name in names)
    last = bytearray(raw[end:])
    last[8:12] = struct.pack("<HH", 1000, 1000)
    last[12:16] = struct.pack("<I", len(entries))
    path.write_bytes(raw[:at] + entries + last)
    return path


def patched(path: Path, old: bytes, new: bytes) -> Path:
    raw = path.read_bytes()
    assert old in raw and len(old) == len(new)
    path.write_bytes(raw.replace(old, new))
    return path


def a_long_description(path: Path) -> Path:
    """A name of 100 MB, which is a few KB packed."""
    info = tarfile.TarInfo("a.png")
    with gzip.open(path, "wb") as file:
        head = tarfile.TarInfo("././@LongLink")
        head.type, head.size = tarfile.GNUTYPE_LONGNAME, 100_000_000
        file.write(head.tobuf(tarfile.GNU_FORMAT) + b"x" * 100_000_000 + b"\0" * 512 + info.tobuf())
    return path


def with_holes(path: Path) -> Path:
    """A file of 8 GiB that is one block in the archive."""
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": str(8 << 30),
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
    return path


OUT, GROWS, LINK = "leads out of the archive", "unpacks to more than 100 times its size", "is a link, a device or a"
ZERO = b"\0" * 3_000_000

HOSTILE = {
    "up.zip": (lambda p: zipped(p, ("a.png", PNG), ("../up.png", PNG)), OUT),
    "up.tar": (lambda p: tarred(p, ("a.png", PNG), ("../up.png", PNG)), OUT),
    "up_inside.zip": (lambda p: zipped(p, ("a/../../up.png", PNG)), OUT),
    "up_inside.tgz": (lambda p: tarred(p, ("a/../../up.png", PNG)), OUT),
    "absolute.zip": (lambda p: zipped(p, (f"{p.parent}/up.png", PNG)), OUT),
    "absolute.tar": (lambda p: tarred(p, (f"{p.parent}/up.png", PNG)), OUT),
    "backslash.zip": (lambda p: zipped(p, ("..\\up.png", PNG)), OUT),
    "drive.zip": (lambda p: zipped(p, ("C:/up.png", PNG)), OUT),
    "folder_up.tar": (lambda p: tarred(p, (directory("../up"), b""), ("a.png", PNG)), OUT),
    "control.zip": (lambda p: zipped(p, ("a\x1b[2J.png", PNG)), "has a name that is none"),
    "empty_part.tar": (lambda p: tarred(p, ("a//b.png", PNG)), "has a name that is none"),
    "nul.zip": (lambda p: patched(zipped(p, ("a.pngx", PNG)), b"a.pngx", b"a.png\0"), "has a NUL in its name"),
    "link.zip": (
        lambda p: zipped(p, (linked_zip("pics", stat.S_IFLNK | 0o777), b".."), ("pics/up.png", PNG)),
        "is a link or a device",
    ),
    "link.tar": (lambda p: tarred(p, (link(tarfile.SYMTYPE, "pics", ".."), b""), ("pics/up.png", PNG)), LINK),
    "link_in.tar": (lambda p: tarred(p, ("b.png", PNG), (link(tarfile.SYMTYPE, "a.png", "b.png"), b"")), LINK),
    "hard_link.tgz": (lambda p: tarred(p, (link(tarfile.LNKTYPE, "a.png", "/etc/passwd"), b"")), LINK),
    "device.tar": (lambda p: tarred(p, (link(tarfile.CHRTYPE, "a.png", ""), b"")), LINK),
    "pipe.tar": (lambda p: tarred(p, (link(tarfile.FIFOTYPE, "a.png", ""), b"")), LINK),
    "device.zip": (lambda p: zipped(p, (linked_zip("a.png", stat.S_IFCHR | 0o666), b"")), "is a link or a device"),
    "bomb.zip": (lambda p: zipped(p, ("a.png", PNG), ("b.png", ZERO)), f"'b.png' {GROWS}"),
    "bomb.tar.gz": (lambda p: tarred(p, ("a.png", PNG), ("b.png", ZERO)), f"'b.png' {GROWS}"),
    "many_small.zip": (overlapping, GROWS),
    "holes.tar": (with_holes, LINK),
    "description.tgz": (a_long_description, "cannot be unpacked: a description of 100,000,"),
    "twice.zip": (lambda p: zipped(p, ("a.png", PNG), ("b.png", b""), ("a.png", b"x")), "'a.png' and 'a.png' are one"),
    "twice.tar": (lambda p: tarred(p, ("a.png", PNG), ("a.png", b"x")), "'a.png' and 'a.png' are one file's name"),
    "case.zip": (lambda p: zipped(p, ("a/A.png", PNG), ("A/a.png", b"x")), "'A/a.png' and 'a/A.png' are one"),
    "spelling.tar": (lambda p: tarred(p, ("é.png", PNG), ("e\u0301.png", PNG)), "are one file's name"),
    "file_and_folder.tar": (lambda p: tarred(p, ("a", PNG), ("a/b.png", PNG)), "'a' is a file and a folder"),
    "encrypted.zip": (
        lambda p: patched(zipped(p, ("a.png", PNG)), b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0"),
        "is encrypted",
    ),
    "other.zip": (
        lambda p: zipped(p, ("a.png", PNG), compression=zipfile.ZIP_LZMA),
        "is packed neither by deflate nor as it is",
    ),
    "empty.zip": (lambda p: zipped(p), "there are no files in it"),
    "text.zip": (lambda p: p.write_text("no archive"), "cannot be unpacked: File is not a zip file"),
    "text.tar": (lambda p: p.write_text("no archive"), "cannot be unpacked: "),
    "text.tgz": (lambda p: p.write_text("no archive"), "cannot be unpacked: Not a gzipped file"),
    "liar.zip": (lambda p: patched(zipped(p, ("a.png", PNG)), PNG[40:80], bytes(40)), "cannot be unpacked: "),
}
assert len(HOSTILE) >= 15


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_write_nothing(tmp_path, cache, name, monkeypatch):
    make, found = HOSTILE[name]
    archive = tmp_path / "in" / name
    archive.parent.mkdir()
    make(archive)
    written = []
    if name != "liar.zip":  # what is wrong with its bytes is seen when they are read
        monkeypatch.setattr(archives, "_write", lambda *_: written.append(1))
    with pytest.raises(DataError, match=f"^{archive}: .*{found}.*\n  Make the archive again; or look at it, unpack"):
        unpack(archive)
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left - {f"in/{name}"} == {next(str(f.relative_to(tmp_path)) for f in cache.rglob("*.lock"))}
    assert not written
    assert not [folder for folder in (cache / "archives").iterdir() if folder.is_dir()]


def test_limits(tmp_path, cache, monkeypatch):
    archive = zipped(tmp_path / "a.zip", ("a.png", PNG), ("b.png", PNG))
    monkeypatch.setattr(archives, "MAX_FILES", 1)
    with pytest.raises(DataError, match="there are more than 1 files in it, or 1,024 GiB"):
        unpack(archive)
    monkeypatch.setattr(archives, "MAX_FILES", 2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=len(PNG)))
    with pytest.raises(DataError, match=f"needs at least {2 * len(PNG):,} bytes in the cache, where {len(PNG):,} are"):
        unpack(archive)


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, cache, name, monkeypatch):
    def full(source, target, size):
        target.write(source.read(10))
        raise OSError(28, "No space left on device")

    archive = made(tmp_path / name, *FILES.items())
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full)
        with pytest.raises(DataError, match=r"cannot be unpacked: .* No space left on device"):
            unpack(archive)
    assert {file.suffix for file in (cache / "archives").iterdir()} == {".lock"}
    assert contents(unpack(archive)) == FILES


def _killed(archive: Path, after: int) -> None:
    """Unpack an archive in a process that dies before it writes one more file than these."""
    real = archives.shutil.copyfileobj
    written = []

    def copy(*words):
        if len(written) == after:
            os._exit(9)
        written.append(real(*words))

    archives.shutil.copyfileobj = copy
    os.rename = lambda *_: os._exit(9)
    unpack(archive)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_killed_half_way_it_is_unpacked_anew(tmp_path, cache, after):
    archive = zipped(tmp_path / "a.zip", *FILES.items())
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(archive, after))
    process.start()
    process.join()
    assert process.exitcode == 9
    (part,) = (cache / "archives").glob("*.part")
    assert len(contents(part)) == min(after + 1, 3)
    folder = unpack(archive)
    assert contents(folder) == FILES and not part.exists()
