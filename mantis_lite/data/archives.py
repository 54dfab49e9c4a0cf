"""An archive of pictures -> a folder in the user's cache, unpacked once; what could do harm is refused before."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import DataError, one_line
from ..files import alone
from .columns import short
from .lengths import cache_dir
from .paths import DRIVE

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_RATIO = 100
"""Unpacked bytes for one of the archive, in all and of any file: pictures come to 1 to 20, and bombs to 1,000."""
MAX_FILES = 2_000_000
"""Mantis-Instruct has 720,000 rows in all its archives together, and a few pictures in each."""
MAX_BYTES = 1 << 40
"""Its largest archive has 47 GB."""
MAX_PIECE = 1 << 20
"""Bytes that may be asked of a .tar at once: what describes a file, as a long name, is read whole."""
REMEDY = "Make the archive again; or look at it, unpack it yourself and name the folder."


class Member(NamedTuple):
    """A file or folder of an archive; `packed` are the bytes it takes there, where that is known."""

    name: str
    size: int
    packed: int | None
    folder: bool
    fault: str | None
    open: Callable[[], IO[bytes]]


def unpack(archive: Path) -> Path:
    """The folder with the files of an archive, from the cache where it was unpacked before. Raises DataError.

    Refused are names that lead out, links, devices, files of one name and what grows too much: before a byte is
    written. An archive is known by its path, size and time. Killed in between, it is unpacked anew.
    """
    described = archive.stat()
    key = blake2b(f"{archive.resolve()}\0{described.st_size}\0{described.st_mtime_ns}".encode(), digest_size=16)
    folder = cache_dir() / "archives" / key.hexdigest()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_suffix(".lock")), _told(archive):  # a second process waits, and finds it done
        if not folder.is_dir():
            _refuse(archive, _members(archive), shutil.disk_usage(folder.parent).free)
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)  # of one that was killed
            try:
                _write(_members(archive), part)
                os.rename(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)  # where it did not come to its end
    return folder


def _members(archive: Path) -> Iterator[Member]:
    return _of_zip(archive) if archive.name.endswith(".zip") else _of_tar(archive)


def _of_zip(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            fault = None
            if info.flag_bits & 1:
                fault = "is encrypted"
            elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                fault = "is a link or a device"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                fault = "is packed neither by deflate nor as it is"
            elif info.orig_filename != info.filename:
                fault = "has a NUL in its name"
            read = _opener(opened.open, info)
            yield Member(info.filename, info.file_size, info.compress_size, info.is_dir(), fault, read)


def _of_tar(archive: Path) -> Iterator[Member]:
    packed = not archive.name.endswith(".tar")
    with gzip.open(archive) if packed else archive.open("rb") as file:
        opened = tarfile.open(fileobj=_Pieces(file), mode="r:")  # type: ignore[call-overload]  # it only reads and seeks
        while (info := opened.next()) is not None:
            plain = info.isdir() or (info.isreg() and not info.issparse())
            fault = None if plain else "is a link, a device or a file with holes"
            yield Member(info.name, info.size, None, info.isdir(), fault, _opener(opened.extractfile, info))
            opened.members = []  # or all that were passed are kept


def _opener(read: Callable[[Any], Any], info: Any) -> Callable[[], IO[bytes]]:
    return lambda: read(info)


class _Pieces:
    """A file of which no more can be had at once than there may be."""

    def __init__(self, file: Any) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._read = file.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_PIECE:
            raise tarfile.ReadError(f"a description of {size:,} bytes")
        return self._read(size)


def _refuse(archive: Path, members: Iterable[Member], free: int) -> None:
    """Look at every member and raise DataError for the first that may not be."""
    size = archive.stat().st_size
    files, folders, total = dict[str, str](), set[str](), 0
    for count, member in enumerate(members, 1):
        name = member.name
        if fault := member.fault or _misnamed(name):
            raise _fault(archive, f"{short(name)} {fault}")
        total += member.size
        if member.size > MAX_RATIO * (size if member.packed is None else member.packed) or total > MAX_RATIO * size:
            raise _fault(archive, f"{short(name)} unpacks to more than {MAX_RATIO} times its size")
        if total > MAX_BYTES or count > MAX_FILES:
            raise _fault(archive, f"there are more than {MAX_FILES:,} files in it, or {MAX_BYTES >> 30:,} GiB")
        if total > free:
            raise _fault(archive, f"needs at least {total:,} bytes in the cache, where {free:,} are free")
        # Also on disks to which A and a, or two spellings of é, are one name.
        plain = unicodedata.normalize("NFC", name.removeprefix("./").rstrip("/")).casefold()
        folders.update(plain[:at] for at, letter in enumerate(plain) if letter == "/")
        if member.folder:
            folders.add(plain)
        elif plain in files:
            raise _fault(archive, f"{short(name)} and {short(files[plain])} are one file's name")
        else:
            files[plain] = name
    if both := folders & files.keys():
        raise _fault(archive, f"{short(min(both))} is a file and a folder")
    if not files:
        raise _fault(archive, "there are no files in it")


def _misnamed(name: str) -> str | None:
    """What is wrong with a member's name."""
    parts = name.rstrip("/").split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or DRIVE.match(name):
        return "leads out of the archive"
    if not name.isprintable() or "" in parts or "." in parts[1:]:
        return "has a name that is none"
    return None


def _write(members: Iterable[Member], folder: Path) -> None:
    """Write the bytes of the files, and nothing else that an archive says of them: no owner, mode or link."""
    for member in members:
        path = folder / member.name
        (path if member.folder else path.parent).mkdir(parents=True, exist_ok=True)
        if not member.folder:
            with member.open() as source, path.open("xb") as target:
                shutil.copyfileobj(source, target, MAX_PIECE)


@contextmanager
def _told(archive: Path) -> Iterator[None]:
    """What is wrong with an archive, or with the disk, as an error of the data."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise _fault(archive, f"cannot be unpacked: {one_line(error)}") from None


def _fault(archive: Path, found: str) -> DataError:
    return DataError(f"{archive}: {found}\n  {REMEDY}")
