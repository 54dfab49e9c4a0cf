"""Folders of a run that are written whole or not at all, verified before they are read, and rotated by step."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path

from safetensors import SafetensorError

from ..errors import DiskError, ResumeError, one_line
from ..files import sync, write_whole
from .ranks import ALONE, Ranks

log = logging.getLogger("mantis_lite")

MANIFEST = "manifest.json"
"""The size and SHA-256 of every other file of a folder; written last."""

UNFINISHED = ".tmp-"
"""In the name of what is being written or removed, and of nothing else."""


def saved(run_dir: Path) -> list[Path]:
    """The checkpoints of a run by step, the newest first; whether they are whole, `fault` says."""
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else []
    steps = sorted(
        (int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name))), reverse=True
    )
    return [folder_of(run_dir, step) for step in steps]


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return run_dir / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def fault(folder: Path) -> str | None:
    """What is not as it was written, in words; None where a folder is whole."""
    try:
        text = (folder / MANIFEST).read_text()
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{MANIFEST} is damaged"
        there = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
        for name in sorted(files.keys() ^ there.keys()):
            return f"{name} is missing" if name in files else f"{name} was not there when it was saved"
        return next((f"{name} is not as it was written" for name in files if _facts(there[name]) != files[name]), None)
    except FileNotFoundError:
        return f"there is no {MANIFEST}"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):  # JSON or UTF-8 no more, or other things than files in it
        return f"{MANIFEST} is damaged"


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what to say of newer ones that are not.

    None where nothing has been saved yet. Raises ResumeError where no checkpoint is whole.
    """
    skipped: list[str] = []
    for folder in saved(run_dir):
        found = fault(folder)
        if found is None:
            return folder, skipped
        skipped.append(f"{folder.name} is skipped: {found}")
    if skipped:
        raise ResumeError(
            f"run_dir: {run_dir} has no checkpoint that is whole; {'; '.join(skipped)}\n"
            "  Put the files back, or add --from-scratch to move the run aside and begin anew."
        )
    return None, skipped


@contextmanager
def written(folder: Path, size: int, ranks: Ranks = ALONE) -> Iterator[Path]:
    """A folder of the same name to write files in, which appears in its place as a whole, or not at all.

    Every process of a run writes its own files there, and the first puts it in its place. What was there is replaced.
    Raises DiskError, which says that about `size` bytes are needed, where it cannot be; in all processes.
    """
    aside = ranks.told(folder.with_name(f"{folder.name}{UNFINISHED}{os.getpid()}"))
    beside = aside / folder.name
    try:
        with _together(folder, size, ranks) as mine:
            if mine:
                beside.mkdir(parents=True)
        with _together(folder, size, ranks):
            yield beside
        with _together(folder, size, ranks) as mine:
            if mine:
                _seal(beside)
                remove(folder)
                os.rename(beside, folder)
                sync(folder.parent)
    finally:
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)  # what a full disk leaves is cleared away at the next start


@contextmanager
def _together(folder: Path, size: int, ranks: Ranks) -> Iterator[bool]:
    """A block, told whether this is the first process, after which all go on; or none, if one's disk is at fault."""
    fault: Exception | None = None
    try:
        yield ranks.is_first
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _of_disk(error):
            raise
        fault = error
    if not ranks.all(fault is None):
        raise DiskError(_unwritten(folder, size, fault)) from fault


def rotate(run_dir: Path, keep: int | None, best: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and the best, once the newest has been verified.

    One that cannot be removed stays, with a warning.
    """
    checkpoints = saved(run_dir)
    older = [folder for folder in checkpoints[keep:] if folder != best] if keep else []
    if not older or fault(checkpoints[0]) is not None:
        return
    for folder in older:
        try:
            remove(folder)
        except OSError as error:
            log.warning("%s cannot be removed: %s", folder, error.strerror)


def remove(folder: Path) -> None:
    """Remove a folder so that a kill half-way leaves nothing that is taken for it. Raises OSError."""
    aside = folder.with_name(f"{folder.name}{UNFINISHED}old-{os.getpid()}")
    try:
        os.rename(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)


def sweep(run_dir: Path) -> None:
    """Clear away what a killed run was writing or removing."""
    for path in run_dir.glob(f"*{UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def require_space(run_dir: Path, size: int, saves: int, keep: int | None) -> None:
    """Raise DiskError where the disk has no room for `saves` more checkpoints of `size` bytes, `keep` of all kept.

    One more is there while it is written.
    """
    have = len(saved(run_dir))
    held = max(1, min(have + saves, keep or have + saves) + 1 - have)
    free = shutil.disk_usage(run_dir).free
    if held * size > free:
        more = "" if keep == 1 or held <= 2 else ", set train.save_total_limit=1"
        raise DiskError(
            f"run_dir: {_counted(held)} of about {_bytes(size)} take {_bytes(held * size)} on the disk of {run_dir}, "
            f"and {_bytes(free)} are free\n  Free some{more}, or set run_dir to another disk."
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / MANIFEST)


def _facts(file: Path) -> list[int | str]:
    with file.open("rb") as opened:
        found = file_digest(opened, "sha256").hexdigest()
        return [opened.tell(), found]


def _manifest(files: dict[str, list[int | str]]) -> str:
    """One way alone to write it, so that any other byte in it is noticed."""
    return json.dumps({"files": files}, indent=1) + "\n"


def _seal(folder: Path) -> None:
    """Put everything on the disk, the manifest last."""
    files = _files(folder)
    for path in files:
        sync(path)
    facts = {file.relative_to(folder).as_posix(): _facts(file) for file in files}
    write_whole(folder / MANIFEST, _manifest(facts).encode())
    for path in {file.parent for file in files} | {folder}:
        sync(path)


def _of_disk(error: Exception) -> bool:
    """torch and safetensors say in words what an OSError says by its type."""
    if isinstance(error, RuntimeError):  # the last of a file fails as C++ has it
        return any(sign in str(error) for sign in ("PytorchStreamWriter", "inline_container", "iostream"))
    return isinstance(error, OSError) or "os error" in str(error).lower()


def _unwritten(folder: Path, size: int, error: Exception | None) -> str:
    free = shutil.disk_usage(folder.parent).free
    reason = "another process of the run could not write its part"
    if error is not None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    needs = f"it takes about {_bytes(size)}, and {_bytes(free)} are free"
    before = [path for path in saved(folder.parent) if path != folder]
    kept = f" {before[0].name} is as it was: the run goes on from there." if before else ""
    full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Free some room" if full else "See that the folder can be written"
    return f"{folder} could not be written: {reason}; {needs}\n  {remedy}, and run the same command again.{kept}"


def _counted(count: int) -> str:
    return f"{count} more checkpoint{'s' if count > 1 else ''}"


def _bytes(size: int) -> str:
    return f"{size:,} bytes" if size < 10**6 else f"{size / 10**6:,.1f} MB"
