"""A dataset on the hub -> a folder here: of one commit, gone on with where it was cut off, and verified."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, silent_tqdm, validate_repo_id

from ..errors import DataError, DiskError, MantisError, one_line
from ..files import sync
from .archives import misnamed
from .columns import short
from .repository import SHORT, File, Repository, digest, place_of, read_repository, renamed

PART = ".part"
"""What a file's name ends in until all of it is here and verified."""
AGAIN = "Run the same command again: what has come is not fetched again."
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOTDIR)
Watch = Callable[[int], None]
"""Is told of bytes as they come, and of those that are given up as a negative number."""


@dataclass
class Wanted:
    """What is to be fetched of a repository: the files of `subsets` by name, each with all its bytes."""

    repository: Repository
    subsets: dict[str, list[str]]
    notices: list[str]

    @property
    def names(self) -> list[str]:
        return [name for names in self.subsets.values() for name in names]

    @property
    def size(self) -> int:
        """Bytes of all files, whether they are here or not."""
        return sum(self.size_of(subset) for subset in self.subsets)

    def size_of(self, subset: str) -> int:
        return sum(self.repository.files[name].size for name in self.subsets[subset])


def is_name(repo: str) -> bool:
    """Whether it is user/name, as the hub calls a model or data set."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return repo.count("/") == 1


def find(
    repo: str,
    subsets: Iterable[str] | None = None,
    to: Path | None = None,
    splits: Sequence[str] = ("train",),
    revision: str | None = None,
) -> Wanted:
    """What is to be fetched of a dataset, user/name or a short name: all of its subsets that have the splits, or some.

    A folder that holds some of it stays at its commit; a new one is at what `revision`, or main, is now. Raises
    DataError.
    """
    repo = SHORT.get(repo, repo)
    if not is_name(repo):
        raise DataError(f"{repo}: is no dataset's name\n  Write user/name, or {' or '.join(SHORT)}.")
    with _told(repo):
        repository = _at_commit(repo, to or place_of(repo), revision)
    names, notices = renamed(repo, subsets or [])
    if subsets is None:
        names = [name for name in repository.splits if any(name in repository.subsets_with(split) for split in splits)]
    wanted = {name: list[str]() for name in names}
    for name in names:
        for split in splits:
            if subsets is not None or split in repository.splits[name]:
                wanted[name] += repository.files_of(name, split)
    if not wanted:
        raise DataError(f"{repo}: no subset to download\n  There are: {', '.join(repository.splits) or 'none'}.")
    return Wanted(repository, wanted, notices)


def _at_commit(repo: str, folder: Path, revision: str | None) -> Repository:
    held = read_repository(folder)
    if held and held.repo != repo:
        raise DataError(f"{folder}: holds {held.repo}\n  Name another folder with --to.")
    if held and revision is None:
        return held
    api = HfApi()
    commit = api.dataset_info(repo, revision=revision).sha
    assert commit is not None
    if held and held.revision == commit:
        return held
    if held:
        raise DataError(
            f"{folder}: holds {repo} as of {held.revision}, and {revision} is {commit}\n"
            "  Name another folder with --to, or leave --revision out to go on with what it holds."
        )
    listed = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
    files = [file for file in listed if isinstance(file, RepoFile)]
    for file in files:
        if fault := misnamed(file.path):
            raise DataError(f"{repo}: {short(file.path)} {fault}\n  Ask its owner to rename it.")
    oids = {file.path: File(file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files}
    return Repository(folder, repo, commit, oids)


def fetch(wanted: Wanted, max_workers: int = 8, anew: bool = False, watch: Watch = lambda done: None) -> list[str]:
    """Fetch what is not here yet, some files at once; returns the names of those that came.

    What is here is told by its size and time of change, or is read again with `anew`. Every file that comes is
    compared with the hash the hub states. Killed in between, it goes on at the byte it had come to. Raises DataError,
    and DiskError where there is no room.
    """
    repository = wanted.repository
    folder = repository.folder
    with _told(repository.repo), _held(folder):
        other = read_repository(folder)
        if other and other.revision != repository.revision:
            raise DataError(f"{folder}: another process has begun with {other.revision}\n  {AGAIN}")
        if other:  # as another process has left it meanwhile
            repository.files = other.files
        repository.save()
        with ThreadPoolExecutor(max_workers) as pool:
            here = list(pool.map(lambda name: repository.check(name, anew), wanted.names))
        repository.save()
        missing = [name for name, is_here in zip(wanted.names, here, strict=True) if not is_here]
        _refuse_full(wanted, missing)
        watch(sum(repository.files[name].size for name in wanted.names) - _left(repository, missing))
        _Fetch(repository, watch).all(missing, max_workers)
        _remember(repository)
    return missing


def _left(repository: Repository, names: list[str]) -> int:
    """Bytes that are yet to come."""
    parts = [repository.folder / (name + PART) for name in names]
    return sum(repository.files[name].size for name in names) - sum(p.stat().st_size for p in parts if p.is_file())


def _refuse_full(wanted: Wanted, missing: list[str]) -> None:
    repository = wanted.repository
    left, free = _left(repository, missing), shutil.disk_usage(repository.folder).free
    if left > free:
        sizes = ", ".join(f"{subset} {wanted.size_of(subset) / 1e9:,.1f} GB" for subset in wanted.subsets)
        raise DiskError(
            f"{repository.folder}: {left / 1e9:,.1f} GB are yet to come, and {free / 1e9:,.1f} GB are free\n"
            f"  Free some, name another disk with --to, or fewer with --subsets: {sizes}."
        )


def _remember(repository: Repository) -> None:
    """Leave a link to a folder of the user's own where recipes look for the dataset."""
    place = place_of(repository.repo)
    if repository.folder.resolve() == place.resolve() or (place.exists() and not place.is_symlink()):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(repository.folder.resolve())


@dataclass
class _Fetch:
    """Files on their way; `stop` ends all of them where one has failed."""

    repository: Repository
    watch: Watch
    stop: Event = field(default_factory=Event)
    lock: Any = field(default_factory=Lock)

    def all(self, names: list[str], max_workers: int) -> None:
        largest = sorted(names, key=lambda name: -self.repository.files[name].size)
        with ThreadPoolExecutor(max_workers) as pool:
            try:
                for done in as_completed([pool.submit(self.one, name) for name in largest]):
                    done.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def one(self, name: str) -> None:
        file = self.repository.folder / name
        part, known = file.with_name(file.name + PART), self.repository.files[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(2):  # what was left of a download that was cut off may be wrong, a whole one may not
            begun = self._fetch_rest(name, part, known)
            if digest(part, known.oid) == known.oid:
                break
            part.unlink()
            self.watch(-known.size)
            if attempt or not begun:
                raise DataError(
                    f"{self.repository.repo}: {name} is not what the hub says it is: its bytes have another hash\n"
                    "  Run the same command again; if it comes so each time, the proxy or the disk changes it."
                )
        os.replace(part, file)
        with self.lock:
            self.repository.files[name] = known._replace(seen=file.stat().st_mtime_ns)
            self.repository.save()

    def _fetch_rest(self, name: str, part: Path, known: File) -> int:
        """Fetch what is not in `part` yet; returns how many bytes were."""
        if part.is_file() and part.stat().st_size > known.size:
            part.unlink()
        repository = self.repository
        url = hf_hub_url(repository.repo, name, repo_type="dataset", revision=repository.revision)
        with part.open("ab") as out:
            begun = out.tell()
            # Not hf_hub_download: it begins a file anew that a kill has cut off (huggingface_hub 1.31 and 2.4).
            if begun < known.size:
                http_get(
                    url,
                    _Watched(out, self.watch, self.stop),  # type: ignore[arg-type]
                    resume_size=begun,
                    headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                    tqdm_class=silent_tqdm,  # type: ignore[arg-type]
                )
        sync(part)
        return begun


@dataclass
class _Watched:
    """A file that tells of what is written, until all are to stop."""

    file: IO[bytes]
    watch: Watch
    stop: Event

    def write(self, data: bytes) -> int:
        if self.stop.is_set():
            raise InterruptedError("another file failed")
        self.watch(len(data))
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, at: int) -> int:
        return self.file.seek(at)

    def truncate(self) -> int:
        """The server begins anew."""
        had = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)
        self.watch(-had)
        return self.file.truncate()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time in a folder. Raises DataError for a second."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process downloads to it\n  Let it finish.") from None
        yield


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """What the hub or the disk refuses, in words that say what to do."""
    try:
        yield
    except MantisError:
        raise
    except RevisionNotFoundError:
        raise DataError(f"{repo}: has no such revision\n  Leave --revision out, or name a branch or commit.") from None
    except RepositoryNotFoundError:
        remedy = "Check its name; what is private or asks for consent needs `hf auth login`, or HF_TOKEN."
        raise DataError(f"{repo}: no such dataset on the hub, or none for you\n  {remedy}") from None
    except HfHubHTTPError as error:
        remedy = "Log in with `hf auth login`." if error.response.status_code in (401, 403) else AGAIN
        raise DataError(
            f"{repo}: the hub answers {error.response.status_code}: {one_line(error)}\n  {remedy}"
        ) from None
    except OSError as error:
        if error.errno in FULL:
            remedy = f"Free some, or name another folder with --to. {AGAIN}"
            raise DiskError(f"{repo}: {error.filename or 'a file'}: {error.strerror}\n  {remedy}") from None
        raise DataError(f"{repo}: the hub cannot be reached: {one_line(error)}\n  {AGAIN}") from None
    except HTTPError as error:
        raise DataError(f"{repo}: the hub cannot be reached: {one_line(error)}\n  {AGAIN}") from None
