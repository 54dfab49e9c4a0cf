"""Runs in processes forked from one that has imported everything, so that hundreds can be killed in minutes.

`python -m benchmarks.forks` reads a job a line, as JSON, and answers each with a line; `Forks` is its other end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from mantis_lite.errors import MantisError, Stopped
from mantis_lite.recipe_file import make_recipe
from mantis_lite.training.start import start

from . import stock
from .faults import faults

LIMIT = 120
"""Seconds after which a run is taken to hang."""

GRACE = 10
"""Seconds that a run's other processes are given when one has failed."""


class Forks:
    """The process to fork from; each call is a run in a child of its own. `more` modules are imported as well."""

    def __init__(self, *more: str) -> None:
        self.more = more

    def __enter__(self) -> Forks:
        command = [sys.executable, "-m", "benchmarks.forks", *self.more]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        assert self.process.stdin
        self.stdin = self.process.stdin
        self.numbers = count()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0]:
            self.process.terminate()  # with the run that is in its way
        elif self.process.poll() is None:
            # Said, as the pipe may stay open in what this process has forked.
            self.stdin.write("null\n")
            self.stdin.flush()
        self.process.communicate()

    def __call__(self, settings: dict[str, Any], **job: Any) -> dict[str, Any]:
        """Train a recipe; returns its `status` (an exit code, or minus a signal), what it `said`, and its `seconds`.

        After `kill_after` seconds it is killed; what else may go wrong is in `faults`, to the process of `faulty` rank;
        `options` are those of `start`; `environment` is added to the child's. With `ranks` it is run by so many
        children together. With `stock`, the settings are those of `benchmarks.stock`. A run that hangs is an assertion.
        """
        return self.end(self.begin(settings, **job))

    def begin(self, settings: dict[str, Any], **job: Any) -> int:
        """Begin a job without waiting for it; returns its number."""
        number = next(self.numbers)
        self.stdin.write(json.dumps({"number": number, "settings": settings, **job}) + "\n")
        self.stdin.flush()
        return number

    def end(self, number: int) -> dict[str, Any]:
        """The answer to a job that was begun."""
        assert self.process.stdout
        for line in self.process.stdout:
            answer = json.loads(line)
            if answer.pop("number") == number:  # not that of a call which was interrupted as it waited
                assert not answer.pop("hangs"), f"no end after {LIMIT} s: {answer['said']}"
                return answer
        raise AssertionError(f"the process that forks ended with {self.process.wait()}")


def main() -> None:
    """Fork a child for each job on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and a shell's background this
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        if (job := json.loads(line)) is None:
            break
        with tempfile.TemporaryFile() as said:  # a pipe would be full at some time
            begun = time.monotonic()
            children = []
            for environment in _environments(job.get("ranks")):
                children.append(os.fork())
                if children[-1] == 0:
                    _child(job, environment, said)
            status, hangs = _wait(children, begun, job.get("kill_after"))
            seconds = time.monotonic() - begun
            said.seek(0)
            text = said.read().decode(errors="replace")
        answer = {"number": job["number"], "status": status, "hangs": hangs, "said": text, "seconds": seconds}
        print(json.dumps(answer), file=answers, flush=True)


def _environments(ranks: int | None) -> list[dict[str, str]]:
    """What a launcher tells each process of a run."""
    if ranks is None:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in environment.items()} for environment in each]


def _child(job: dict[str, Any], environment: dict[str, str], said: BinaryIO) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(said.fileno(), 2)
    os.environ.update(job.get("environment", {}) | environment)
    here = int(environment.get("RANK", 0)) == job.get("faulty", 0)
    code = 1
    try:
        _train(job, faults(job) if here else [])
        code = 0
    except (MantisError, Stopped) as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        code = error.exit_code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT  # as a shell has it of Python
    except BaseException as error:  # whatever it is must be told, and no child may go on as the parent
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


def _train(job: dict[str, Any], callbacks: list[TrainerCallback]) -> None:
    if job.get("stock"):
        stock.train(job["settings"], callbacks)
        return
    started = start(make_recipe(job["settings"]), callbacks, **job.get("options", {}))
    os.write(2, "".join(f"notice: {notice}\n" for notice in started.notices).encode())
    started.train()


def _wait(children: list[int], begun: float, kill_after: float | None) -> tuple[int, bool]:
    """The first status of children that is not 0, killed when their time is over; and whether one seemed to hang.

    Where one fails, the others are given a while, and killed, as launchers do.
    """
    limit = LIMIT if len(children) == 1 else 2 * LIMIT  # DeepSpeed compiles something the first time
    until = begun + (limit if kill_after is None else kill_after)
    hangs, first, left = False, 0, list(children)
    try:
        while left:
            for child in [child for child in left if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)]:
                left.remove(child)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                if status and not first:
                    first, until = status, min(until, time.monotonic() + GRACE)
            if left and time.monotonic() > until:
                hangs = kill_after is None and not first
                first = first or -signal.SIGKILL
                break
            time.sleep(0.002)
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # it, where this one ends, and workers that outlive it
        for child in left:
            os.waitpid(child, 0)
    return first, hangs


if __name__ == "__main__":
    main()
