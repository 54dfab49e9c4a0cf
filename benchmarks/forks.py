"""Runs in processes forked from one that has imported everything, so that hundreds can be killed in minutes.

`python -m benchmarks.forks` reads a job a line, as JSON, and answers each with a line; `Forks` is its other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from mantis_lite.errors import MantisError, Stopped
from mantis_lite.recipe import make_recipe
from mantis_lite.training import curve, run

LIMIT = 120
"""Seconds after which a run is taken to hang."""


class Forks:
    """The process to fork from; each call is a run in a child of its own."""

    def __enter__(self) -> Forks:
        command = [sys.executable, "-m", "benchmarks.forks"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()

    def __call__(self, settings: dict[str, Any], **job: Any) -> dict[str, Any]:
        """Train a recipe; returns its `status` (an exit code, or minus a signal), what it `said`, and its `seconds`.

        `kill_after` seconds it is killed; `kill_at` a step it kills itself, having saved it or not as `saved` says;
        `signals` are [seconds after the first step, signal]; `options` are those of `start`.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"settings": settings, **job}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class KillAt(TrainerCallback):
    """Kills its own process at the end of a step, before it is saved or after."""

    def __init__(self, step: int, saved: bool) -> None:
        self.step, self.saved = step, saved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.saved:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Signalled(TrainerCallback):
    """Sends its own process signals in the middle of a step."""

    def __init__(self, signals: list[tuple[int, int]]) -> None:
        self.signals = dict(signals)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if number := self.signals.pop(state.global_step + 1, None):
            os.kill(os.getpid(), number)


def main() -> None:
    """Fork a child for each job on standard input."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    assert curve and run  # imported before the first fork
    for line in sys.stdin:
        job = json.loads(line)
        reading, writing = os.pipe()
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(job, writing)
        os.close(writing)
        status = _wait(child, begun, job.get("kill_after"))
        with open(reading, encoding="utf-8") as said:
            answer = {"status": status, "said": said.read(), "seconds": time.monotonic() - begun}
        print(json.dumps(answer), flush=True)


def _child(job: dict[str, Any], said: int) -> None:
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(said, 2)
    callbacks: list[TrainerCallback] = []
    if "kill_at" in job:
        callbacks.append(KillAt(job["kill_at"], job.get("saved", True)))
    if "signals" in job:
        callbacks.append(Signalled(job["signals"]))
    code = 1
    try:
        started = run.start(make_recipe(job["settings"]), callbacks, **job.get("options", {}))
        os.write(2, "".join(f"notice: {notice}\n" for notice in started.notices).encode())
        started.train()
        code = 0
    except (MantisError, Stopped) as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        code = error.exit_code
    except BaseException as error:  # whatever it is must be told, and no child may go on as the parent
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


def _wait(child: int, begun: float, kill_after: float | None) -> int:
    until = begun + (LIMIT if kill_after is None else kill_after)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # workers that outlive it
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
