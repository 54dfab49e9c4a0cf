"""A case in a process and an environment of its own, which trains a round each time that it is its turn."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Timer
from typing import Any

from .cases import Case

ROOT = Path(__file__).parents[2]
SECONDS = 600
"""After which a process that says nothing is ended."""


def python(tool: str) -> Path:
    """The interpreter of a tool's environment; this package is measured in the one that runs."""
    return Path(sys.executable) if tool == "ours" else ROOT / ".venv-peers" / tool / "bin/python"


class Worker:
    """A process that says its versions, trains a first round, and then one more for each `turn`.

    `failed` is what it said last, once it has ended before its time.
    """

    def __init__(self, case: Case, settings: dict[str, Any], folder: Path, threads: int) -> None:
        self.case, self.failed = case, ""
        self.log = folder / f"{case.name}.log"
        own = {"out": str(folder / f"{case.name} run"), "started": time.time()}
        command = [str(python(case.tool)), "-m", f"benchmarks.peers.{case.tool}_case"]
        with self.log.open("w") as log:
            self.process = Popen(
                [*command, json.dumps(settings | case.settings | own)],
                cwd=ROOT,
                env=os.environ | _environment(folder, threads),
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                text=True,
            )

    def turn(self) -> dict[str, Any] | None:
        """Train one more round; None where the process has ended."""
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any] | None:
        """The next line of the process; None where it has ended."""
        assert self.process.stdout is not None
        timer = Timer(SECONDS, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            status = self.process.wait()
            self.failed = said(self.log.read_text()) if status >= 0 else f"ended by signal {-status}"
        return json.loads(line) if line else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def said(log: str) -> str:
    """The last error that a log names, or its last line.

    >>> said("Traceback\\nValueError: no packing here\\nuse another")
    'ValueError: no packing here'
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["nothing"]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return [*lines[-1:], *errors][-1]


def _environment(folder: Path, threads: int) -> dict[str, str]:
    """The same for all: no network and no GPU, caches of their own, threads that do not wait spinning."""
    caches = dict.fromkeys(("HF_HOME", "MODELSCOPE_CACHE", "XDG_CACHE_HOME", "MANTIS_LITE_CACHE"), f"{folder}/cache")
    threaded = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "true"}
    return caches | threaded | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
