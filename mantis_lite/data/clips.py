"""Clips: their size and length from the header alone, and single pictures. Both agree on the size.

FFmpeg runs in a process of its own (`decoder.py`), which a time limit ends: a clip that hangs or crashes it is one
clip's error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from .media import MAX_PIXELS

DECODER = Path(__file__).with_name("decoder.py")
"""A script: FFmpeg is not to be loaded in this process."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What a terminal or a cluster sends to all processes of a run: only those that train act on it."""

PIPE = 1 << 20  # bytes: a picture's pixels pass in fewer pieces than through the usual 64 KiB


class ClipError(ValueError):
    """What is wrong with a clip, without its name."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a clip's header says: (width, height) in pixels as shown, how long, and how many pictures."""

    size: tuple[int, int]
    seconds: float
    frames: int


class Clips:
    """Reads clips in one process beside this one, started when it is first needed; usable after a fork."""

    def __init__(self, limit: float = 30.0) -> None:
        self.limit = limit
        self._child: Child | None = None
        self._forget()

    def __getstate__(self) -> float:
        return self.limit

    def __setstate__(self, limit: float) -> None:
        self.__init__(limit)  # type: ignore[misc]

    def header(self, path: Path, count: bool = False) -> Header:
        """Size, seconds and frames by the header; with `count`, exactly the frames that there are."""
        found, _ = self._ask(path, {"count": count})
        return Header(tuple(found["size"]), found["seconds"], found["frames"])

    def at_times(self, path: Path, times: Sequence[float]) -> list[PIL.Image.Image]:
        """The picture on the screen at each time, in seconds from the first picture; times ascend."""
        return self._pictures(path, "times", [float(seconds) for seconds in times])

    def at_indices(self, path: Path, indices: Sequence[int]) -> list[PIL.Image.Image]:
        """Pictures by their number in the order shown; numbers ascend."""
        return self._pictures(path, "indices", [int(index) for index in indices])

    def close(self) -> None:
        """End the process; a later call starts another."""
        if self._owner != os.getpid():
            self._forget()
        with self._lock:
            self._drop()

    def _pictures(self, path: Path, kind: str, wanted: list[Any]) -> list[PIL.Image.Image]:
        if not wanted:
            return []
        assert wanted[0] >= 0 and wanted == sorted(wanted), wanted
        found, pixels = self._ask(path, {kind: wanted})
        size = tuple(found["size"])
        length = 3 * size[0] * size[1]
        return [PIL.Image.frombytes("RGB", size, pixels[at * length : (at + 1) * length]) for at in found["order"]]

    def _ask(self, path: Path, request: dict[str, Any]) -> tuple[dict[str, Any], memoryview]:
        if self._owner != os.getpid():
            self._forget()
        with self._lock:
            if self._child is not None and not self._child.alive():
                self._drop()  # ended between two clips: no clip's fault
            if self._child is None:
                self._child = Child()
                self._end = weakref.finalize(self, self._child.end)  # with this object, or with Python
            answered = False
            try:
                asked = {"path": os.path.abspath(path), "max_pixels": MAX_PIXELS}
                found, pixels = self._child.ask(asked | request, self.limit)
                answered = True
            finally:
                if not answered:  # the rest of an answer would be taken for the next one's
                    self._drop()
        if "missing" in found:
            raise FileNotFoundError(f"no such file: {path}")
        if "error" in found:
            raise ClipError(found["error"])
        return found, pixels

    def _forget(self) -> None:
        """Begin anew, without a child: also after a fork, where the child and perhaps the lock are another's."""
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._drop()

    def _drop(self) -> None:
        if self._child is not None:
            self._end()
        self._child = None


class Child:
    """A running decoder, and the two pipes to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        command = [sys.executable, "-P", str(DECODER), str(self.owner)]
        # Blocked from before it starts, the signals never end it: it ends with its pipe, its parent or `end`.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        os.set_blocking(self.requests.fileno(), False)
        os.set_blocking(self.answers.fileno(), False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # on Linux
            with contextlib.suppress(PermissionError):  # a user's pipes together have a limit
                fcntl.fcntl(self.answers, fcntl.F_SETPIPE_SZ, PIPE)

    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: dict[str, Any], limit: float) -> tuple[dict[str, Any], memoryview]:
        """The answer to a request and its pixels; ClipError where there is none in time."""
        deadline = time.monotonic() + limit
        try:
            self._write(json.dumps(request).encode() + b"\n", deadline)
            return self._read(deadline)
        except TimeoutError:
            raise ClipError(f"took more than {limit:g} s to read") from None
        except (EOFError, BrokenPipeError):
            raise ClipError(f"ended the process that reads it ({self._cause()})") from None

    def end(self) -> None:
        """Kill the process and wait for it; in a process forked from the owner, only let go of the pipes."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        else:
            self.process.returncode = 0  # not ours to wait for, nor to warn about
        self.requests.close()
        self.answers.close()

    def _write(self, line: bytes, deadline: float) -> None:
        while line:
            _wait(self.requests.fileno(), select.POLLOUT, deadline)
            line = line[os.write(self.requests.fileno(), line) :]

    def _read(self, deadline: float) -> tuple[dict[str, Any], memoryview]:
        line, mark, rest = b"", b"", b""
        while not mark:
            _wait(self.answers.fileno(), select.POLLIN, deadline)
            if not (piece := os.read(self.answers.fileno(), 1 << 16)):
                raise EOFError
            line, mark, rest = (line + piece).partition(b"\n")
        found = json.loads(line)
        width, height = found.get("size", (0, 0))
        pixels = np.empty(3 * width * height * found.get("pictures", 0), np.uint8).data
        pixels[: len(rest)] = rest
        at = len(rest)
        while at < len(pixels):
            _wait(self.answers.fileno(), select.POLLIN, deadline)
            if not (count := os.readv(self.answers.fileno(), [pixels[at:]])):
                raise EOFError
            at += count
        return found, pixels

    def _cause(self) -> str:
        """What the process ended of."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "its pipe was closed"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Wait until a pipe is ready, or has lost its other end; TimeoutError after the deadline."""
    poll = select.poll()  # unlike select(), for any number of open files
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
