"""One run in a folder at a time."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from pathlib import Path

import psutil

from ..errors import DiskError, ResumeError


class Lock:
    """A run's hold on its folder, which other processes respect and a killed one loses.

    By POSIX record locks, which file servers know as well. The process that holds it can take it again, so that a
    notebook may start anew what it did not finish. `key` is what the folder is set by.
    """

    def __init__(self, run_dir: Path, key: str = "run_dir") -> None:
        self.file, self.key = run_dir / ".lock", key
        self.opened: int | None = None

    def take(self) -> None:
        """Take hold of a folder that exists. Raises ResumeError where another process has it, DiskError."""
        if self.opened is not None:
            return
        try:
            opened = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unlockable(error) from error
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(opened, 200).decode(errors="replace").strip() or "another process"
            os.close(opened)
            raise ResumeError(
                f"{self.key}: {self.file.parent} is in use by {holder}\n"
                f"  Let it finish, stop it, or set another {self.key}."
            ) from None
        except OSError as error:
            os.close(opened)
            raise self._unlockable(error) from error
        os.ftruncate(opened, 0)
        os.write(opened, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self.opened = opened

    def _unlockable(self, error: OSError) -> DiskError:
        found = f"{self.key}: {self.file} cannot be written and locked: {error.strerror}"
        return DiskError(f"{found}\n  See that the folder can be written, or set {self.key} to another disk.")

    def release(self) -> None:
        """Let go of it."""
        if self.opened is not None:
            os.ftruncate(self.opened, 0)  # a process may live on after its run, a notebook's
            os.close(self.opened)
            self.opened = None


def lives(run_dir: Path) -> bool:
    """Whether a process that took hold of a folder and has not let go is there yet; another machine's counts as there.

    Not for that process itself: it would lose its hold as it closes the file.
    """
    file = run_dir / ".lock"
    found = re.match(r"process (\d+) on (.*)", file.read_text()) if file.exists() else None
    if found is None:
        return False
    if found[2] != socket.gethostname():
        return True
    try:  # a number is given again once its process has ended
        return psutil.Process(int(found[1])).create_time() <= file.stat().st_mtime
    except psutil.NoSuchProcess:
        return False
