"""A dataset's repository on the hub as of one commit, and which of its files are in a folder here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import file_digest, sha1
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, did_you_mean, one_line
from ..files import write_whole
from .lengths import cache_dir

NAME = "download.json"
INSTRUCT = "TIGER-Lab/Mantis-Instruct"
SHORT = {"mantis-instruct": INSTRUCT}
"""Names of datasets that are known here."""
RENAMED = {INSTRUCT: {"llava_665k_merged": "llava_665k_multi", "lrv": "lrv_multi"}}
"""Subsets that earlier lists of the original call otherwise."""


class File(NamedTuple):
    """What the hub says of a file: its bytes, and their SHA-256 or, of a small one, git's hash.

    `seen` is the time of change (ns) of the file here that was found to be it; None where it has not come.
    """

    size: int
    oid: str
    seen: int | None = None


@dataclass
class Repository:
    """A dataset `repo` at the commit `revision`, kept in `folder`: a subset a folder there, each with its splits'
    Parquet and .zip files."""

    folder: Path
    repo: str
    revision: str
    files: dict[str, File] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, set[str]]:
        """The splits of each subset, in alphabetical order, as the names of its Parquet files begin."""
        found: dict[str, set[str]] = {}
        for subset, slash, name in (name.partition("/") for name in sorted(self.files)):
            if slash and "/" not in name and name.endswith(".parquet"):
                found.setdefault(subset, set()).add(re.split("[-.]", name)[0])
        return found

    def subsets_with(self, split: str) -> list[str]:
        return [subset for subset, splits in self.splits.items() if split in splits]

    def files_of(self, subset: str, split: str) -> list[str]:
        """The names of a subset's files of one split. Raises DataError where there is no such subset or split."""
        splits = self.splits
        if subset not in splits:
            remedy = f"There are: {', '.join(splits)}."
            raise DataError(f"{self.repo}: no subset {subset}{did_you_mean(subset, splits)}\n  {remedy}")
        if split not in splits[subset]:
            found = ", ".join(sorted(splits[subset]))
            raise DataError(f"{self.repo}: {subset} has no split {split}\n  There are: {found}.")
        of_split = re.compile(rf"{re.escape(subset)}/{re.escape(split)}([-.][^/]*parquet|_images[^/]*\.(zip|txt))")
        return sorted(name for name in self.files if of_split.fullmatch(name))

    def has(self, subset: str, split: str) -> bool:
        """Whether all of a split has come. Raises DataError where there is no such subset or split."""
        return all(self.files[name].seen is not None for name in self.files_of(subset, split))

    def check(self, name: str, anew: bool = False) -> bool:
        """Whether a file is here as the hub has it; its bytes are read where it has changed, or `anew`."""
        path, known = self.folder / name, self.files[name]
        try:
            found = path.stat()
            here = found.st_size == known.size and (
                (found.st_mtime_ns == known.seen and not anew) or digest(path, known.oid) == known.oid
            )
        except OSError:
            here = False
        self.files[name] = known._replace(seen=found.st_mtime_ns if here else None)
        return here

    def save(self) -> None:
        """Write down what is here. Raises OSError."""
        content = asdict(self) | {"files": {name: list(known) for name, known in self.files.items()}}
        del content["folder"]
        write_whole(self.folder / NAME, json.dumps(content, indent=1).encode())


def digest(path: Path, oid: str) -> str:
    """The hash of a file's bytes, of the kind that `oid` is: SHA-256, or git's SHA-1 of a blob. Raises OSError."""
    with path.open("rb") as file:
        if len(oid) == 64:
            return file_digest(file, "sha256").hexdigest()
        return file_digest(file, lambda: sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size)).hexdigest()


def place_of(repo: str) -> Path:
    """Where a dataset of the hub is kept where no other folder is named; a link where one was."""
    return cache_dir() / "datasets" / repo.replace("/", "--")


def read_repository(folder: Path) -> Repository | None:
    """What a folder says it holds; None where nothing was downloaded to it. Raises DataError."""
    file = folder / NAME
    try:
        content = json.loads(file.read_bytes())
        files = {name: File(*known) for name, known in content["files"].items()}
        return Repository(folder, content["repo"], content["revision"], files)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: cannot be read: {one_line(error)}\n  Take it away, and download it again.") from None


def renamed(repo: str, subsets: Iterable[str]) -> tuple[list[str], list[str]]:
    """Subsets by the names they have now, each once; and a notice for each that had another."""
    now = RENAMED.get(repo, {})
    names = list(subsets)
    notices = [f"{repo}: {name} is called {now[name]} now" for name in names if name in now]
    return list(dict.fromkeys(now.get(name, name) for name in names)), notices
