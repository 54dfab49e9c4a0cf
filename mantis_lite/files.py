"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(file: Path, content: bytes | Iterable[bytes], synced: bool = True) -> None:
    """Write a file, or its pieces, beside its place and rename it, so that no reader sees half of it. Raises OSError.

    What is not `synced` may be lost with the machine's power, as what is made anew then may.
    """
    beside = file.with_name(f"{file.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        with beside.open("wb") as opened:
            opened.writelines([content] if isinstance(content, bytes) else content)
            opened.flush()
            if synced:
                os.fsync(opened.fileno())
        os.replace(beside, file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that one process makes, while others wait and find it: `make` is given another to fill, renamed then.

    Killed in between, it is made anew. Raises OSError.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_suffix(".lock")):
        if not folder.is_dir():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)  # of one that was killed
            try:
                make(part)
                os.rename(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)  # where it did not come to its end
    return folder


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time; a second waits. Raises OSError."""
    with lock.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
