"""Where the files lie that rows name: within one folder, however a row spells their paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG
from typing import NamedTuple, NoReturn

from .columns import Fault, short
from .download import DownloadError, fetch, kept
from .sample import Sample
from .zipped import Zipped

ODD = re.compile("[\\\\:~\0\ud800-\udfff]|^$")
"""Few names have any of these, and only those are looked at closer."""
LINK = re.compile(r"[A-Za-z][\w+.-]+:/|.*://", re.DOTALL)
DRIVE = re.compile(r"[A-Za-z]:")
SYSTEM = (Path("/proc"), Path("/sys"))
"""What the kernel says of itself, as files."""


class _Listed(NamedTuple):
    """A folder, and what in it is no plain file."""

    folder: Path
    others: set[str]


@dataclass(frozen=True)
class MediaFolder:
    """The pictures and clips of a source's rows.

    They lie within `folder`, to which relative paths lead from; anywhere on this machine where `outside` is set; and
    pictures behind https links where `urls` is. Without a folder there are only the last two.
    """

    folder: Path | None = None
    outside: bool = False
    urls: bool = False
    _known: dict[str, _Listed] = field(default_factory=dict, compare=False, repr=False)
    """What names begin with, up to their last slash, where that is a folder that rows may name."""

    def find(self, name: str, place: str, kind: str) -> Path | Zipped:
        """The file of a picture or clip, or a clip's folder of frames, that a row names in a place. Raises Fault.

        Links are followed: it is where a file really lies that counts. A file that is not there is no fault here, as
        who opens it can say more. A folder is looked at once, so that a file in it costs no call to the system.
        """
        cut = name.rfind("/") + 1
        known, last = self._known.get(name[:cut]), name[cut:]
        if known is None or last in known.others or ODD.search(last):
            return self._look(name, place, kind)
        return known.folder / last

    def fetches(self, sample: Sample) -> bool:
        """Whether a picture of a sample was behind a link."""
        folder = kept("").parent
        return self.urls and any(isinstance(i.source, Path) and i.source.parent == folder for i in sample.images)

    def _look(self, name: str, place: str, kind: str) -> Path:
        """As `find`, of what is not known to be a file of a folder that rows may name."""
        if ODD.search(name) and (fetched := self._odd(name, place, kind)):
            return fetched
        if self.folder is None and not name.startswith("/"):
            remedy = "Set media_dir of the source to the folder, or the .zip or .tar of it, that holds its files."
            raise Fault(f"{place} is a path without a folder to start at ({short(name)})", remedy)
        path = os.path.join(self.folder or "/", name)
        try:
            self._refuse(path, name, place, kind)
        except ValueError as error:  # a NUL, or half a character
            raise Fault(f"{place} is no path: {error}: {short(name)}", "Mend the path in the row.") from None
        return Path(path)

    def _odd(self, name: str, place: str, kind: str) -> Path | None:
        """What a picture's link leads to; None for a path after all. Raises Fault."""
        given = f"{place} is"
        if not name:
            raise Fault(f"{given} an empty path", f"Give the file's path, or take the {kind} out of the row.")
        if LINK.match(name) or name.startswith("data:"):
            return self._fetched(name, place, kind)
        if "\\" in name or DRIVE.match(name):
            raise Fault(f"{given} a path of Windows ({short(name)})", "Write it with /, from the data's folder.")
        if name.startswith("~"):
            raise Fault(f"{given} a path from ~ ({short(name)})", "Write it from the data's folder.")
        return None

    def _fetched(self, link: str, place: str, kind: str) -> Path:
        remedy = f"Download the {kind} and give the file's path."
        if kind != "picture" or not self.urls:
            remedy += " With data.urls=true pictures are fetched from https links." if kind == "picture" else ""
            raise Fault(f"{place} is a link ({short(link)})", remedy)
        try:
            return fetch(link)
        except DownloadError as error:
            raise Fault(f"{place} cannot be fetched: {error} ({short(link)})", remedy) from None

    def _refuse(self, path: str, name: str, place: str, kind: str) -> None:
        """Raise Fault where a path leads out of the folder, or to what is no file; ValueError where it is no path."""
        parent, last = os.path.split(path)
        held = self._holds(parent)
        if held and (listed := _listed(parent)):
            self._known[name[: name.rfind("/") + 1]] = listed
        try:
            mode = os.lstat(path).st_mode
            if S_ISLNK(mode):
                held = self._holds(path)
                mode = os.stat(path).st_mode
        except OSError:
            mode = None
        if S_ISDIR(mode or 0) or last in ("", ".", ".."):
            held = self._holds(path)
        if not held:
            self._refuse_outside(name, place)
        if mode is None or S_ISREG(mode):
            return
        if not S_ISDIR(mode) or kind == "picture":
            what = "a folder" if S_ISDIR(mode) else "a pipe or device, and no file"
            raise Fault(f"{place} is {what} ({short(name)})", f"Give the path of the {kind}'s file.")
        self._refuse_frames(path, name, place)

    def _refuse_frames(self, path: str, name: str, place: str) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_symlink() and not self._holds(entry.path):
                    self._refuse_outside(f"{name}/{entry.name}", place)
                if not entry.name.startswith(".") and not entry.is_file():
                    found = f"{place} is a folder with {short(entry.name)} in it, which is no file"
                    raise Fault(found, "Leave only the frames in it.")

    def _refuse_outside(self, name: str, place: str) -> NoReturn:
        where = f"leads out of {self.folder}" if self.folder else "is a path of this machine"
        raise Fault(
            f"{place} {where} ({short(name)})",
            "Set media_dir of the source to the folder that holds its files; or, if you trust the rows, "
            "data.outside=true.",
        )

    def _holds(self, path: str) -> bool:
        """Whether a path, its links followed, is one that rows may name."""
        real = Path(os.path.realpath(path))
        if any(real.is_relative_to(system) for system in SYSTEM):
            return False
        return self.outside or (self._real is not None and real.is_relative_to(self._real))

    @cached_property
    def _real(self) -> Path | None:
        return None if self.folder is None else Path(os.path.realpath(self.folder))


def _listed(folder: str) -> _Listed | None:
    """What is in a folder; None where it may not be read, as one that can only be passed through."""
    try:
        with os.scandir(folder) as entries:
            others = {entry.name for entry in entries if not entry.is_file(follow_symlinks=False)}
    except OSError:
        return None
    return _Listed(Path(folder), {*others, "", ".", ".."})
