"""Saves that end at any call to the operating system, or on a disk without room: what a run goes on from then.

A process that has trained three steps, and saved the first two, forks a child for each try. The child saves the third
under strace, which kills it before the n-th call that changes a file, or has that call fail.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging as transformers_logging

from mantis_lite.errors import DiskError, ResumeError
from mantis_lite.recipe_file import make_recipe
from mantis_lite.training import checkpoints
from mantis_lite.training.start import start

from . import sides, stock

CALLS = (
    "openat,creat,write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,ftruncate,truncate,fallocate,fsync,"
    "fdatasync,sync_file_range,msync,rename,renameat,renameat2,link,linkat,symlink,symlinkat,mkdir,mkdirat,unlink,"
    "unlinkat,rmdir,chmod,fchmod,fchmodat"
)
"""Calls that change files or folders, or make sure of it."""

ENDS = {"killed": "signal=KILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}
LEVELS = 20
KEPT = 2
"""Checkpoints: the save of the third removes the first."""


@dataclass(frozen=True)
class Saver:
    """A run that is about to save its third step: how it saves, and what would be gone on from."""

    trainer: Trainer
    save: Callable[[], object]
    newest: Callable[[Path], Path | None]
    resumes: Callable[[Path], str | None]
    """Whether a checkpoint can be gone on from, as what it comes to after another step; None where it cannot."""

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.args.output_dir)


def ours(folder: Path) -> Saver:
    """A run of this package."""
    rows = sides.write_rows(folder / "rows.jsonl", 3 * sides.ROWS_A_STEP)
    begun = start(make_recipe(sides.recipe(rows, folder / "run", {"save_total_limit": None})))
    begun.walk()
    trainer = begun.trainer
    trainer.keep = KEPT
    return Saver(trainer, trainer.save_now, lambda run_dir: checkpoints.newest(run_dir)[0], lambda checkpoint: None)


def usual(folder: Path) -> Saver:
    """A run of transformers' Trainer."""
    rows = sides.write_rows(folder / "rows.jsonl", 3 * sides.ROWS_A_STEP)
    trainer = stock.make(sides.usual(rows, folder / "run", {"save_total_limit": None}))
    trainer.train()
    trainer.args.save_total_limit = KEPT

    def resumes(checkpoint: Path) -> str | None:
        further = folder / "further"
        shutil.rmtree(further, ignore_errors=True)

        def goes_on() -> None:
            train = {"max_steps": 4, "save_strategy": "no", "save_steps": 500}
            other = stock.make(sides.usual(rows, further, train))
            other.train(resume_from_checkpoint=str(checkpoint))
            other.save_model(str(further))

        if os.waitpid(forked(goes_on), 0)[1]:
            return None
        return sha256((further / "adapter_model.safetensors").read_bytes()).hexdigest()

    return Saver(trainer, lambda: trainer._save_checkpoint(trainer.model, None), stock.newest, resumes)


class Judge:
    """Says what a run goes on from, by the bytes of the two checkpoints that a save without fault leaves."""

    def __init__(self, saver: Saver) -> None:
        self.saver = saver
        assert os.waitpid(forked(saver.save), 0)[1] == 0
        self.sound = {step: _bytes(checkpoints.folder_of(saver.run_dir, step)) for step in (2, 3)}
        self.goes_on = saver.resumes(checkpoints.folder_of(saver.run_dir, 3))

    def __call__(self) -> str:
        """In words, what is taken: `whole` where it is one of the two."""
        try:
            taken = self.saver.newest(self.saver.run_dir)
        except ResumeError:
            taken = None
        if taken is None:
            return "nothing to resume from"
        found, sound = _bytes(taken), self.sound[checkpoints.step_of(taken)]
        if found == sound:
            return "whole"
        came_to = self.saver.resumes(taken)
        if came_to is None:
            return "broken one taken, cannot resume"
        # The stock Trainer's generators are not pickled to the same bytes each time.
        if came_to != self.goes_on:
            return "broken one taken, goes on otherwise"
        return "whole" if found.keys() == sound.keys() else "broken one taken, goes on the same"


def measure(stock_side: bool, folder: Path) -> dict[str, Any]:
    """Every call of a save killed or failing, and a disk of twenty levels."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    saver = (usual if stock_side else ours)(folder)
    shutil.rmtree(checkpoints.folder_of(saver.run_dir, 3))
    aside = Path(shutil.copytree(saver.run_dir, folder / "aside"))
    judge = Judge(saver)
    _reset(saver.run_dir, aside)
    found: dict[str, Any] = {"checkpoint_bytes": sum(map(len, judge.sound[2].values()))}
    if reason := _untraceable():
        found["calls"] = {"skipped": reason}
    else:
        found["calls"] = dict(_every_call(saver, judge, aside))
    found["full_disk"] = _full_disk(saver, aside, folder / "small")
    return found


def forked(does: Callable[[], object], stops: bool = False) -> int:
    """A child that does it and ends: with 0, a DiskError's code, or 1. It `stops` first, until it is told to go on."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 2)
        if stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        does()
        code = 0
    except DiskError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def _every_call(saver: Saver, judge: Judge, aside: Path) -> Iterator[tuple[str, Any]]:
    """What comes of each way to end, at each call."""
    _, lines = _traced(saver)
    calls = list(_changing(lines, saver.run_dir))
    yield "boundaries", len(calls)
    yield "by_call", dict(Counter(name for name, _ in calls))
    for end, how in ENDS.items():
        outcomes: Counter[str] = Counter()
        codes: Counter[int] = Counter()
        for name, number in calls:
            _reset(saver.run_dir, aside)
            code, lines = _traced(saver, f"inject={name}:{how}:when={number}")
            reached = code == -signal.SIGKILL if end == "killed" else any("(INJECTED)" in line for line in lines)
            codes[code] += 1
            outcomes[judge() if reached else "not reached"] += 1
        yield end, {"outcomes": dict(outcomes), "exit_codes": dict(codes)}
    _reset(saver.run_dir, aside)


def _traced(saver: Saver, *injected: str) -> tuple[int, list[str]]:
    """Save in a child under strace; its exit code, and the calls that it made."""
    log = saver.run_dir.with_name("calls.txt")
    child = forked(saver.save, stops=True)
    os.waitpid(child, os.WUNTRACED)
    options = [f"trace={CALLS}", "signal=none", *injected]
    words = [word for option in options for word in ("-e", option)]
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-y", "-s", "0", *words, "-o", str(log), "-p", str(child)], stderr=subprocess.PIPE
    )
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        assert tracer.poll() is None, "strace could not attach"
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.wait()
    return code, log.read_text().splitlines()


def _changing(lines: list[str], folder: Path) -> Iterator[tuple[str, int]]:
    """The calls that change what is in a folder, each as its name and how many of that name there were."""
    often: Counter[str] = Counter()
    for line in lines:
        found = re.match(r"\d+ +(\w+)\(", line)
        if not found:
            continue
        often[found[1]] += 1
        opens = found[1] == "openat" and not re.search("O_WRONLY|O_RDWR|O_CREAT", line)
        if str(folder) in line and not opens:
            yield found[1], often[found[1]]


def _untraceable() -> str | None:
    """Why calls cannot be traced here, if they cannot."""
    if not shutil.which("strace"):
        return "strace is not installed"
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True)
    return f"strace may not trace here: {done.stderr.strip()}" if done.returncode else None


def _full_disk(saver: Saver, aside: Path, small: Path) -> dict[str, Any]:
    """A small file system, filled to twenty levels from no room at all to more than enough."""
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        return {"skipped": "no right to mount a small file system"}
    kept = saver.trainer.args.output_dir
    saver.trainer.args.output_dir = str(small / "run")
    outcomes: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    try:
        _reset(small / "run", aside)
        judge = Judge(saver)  # its own: the stock Trainer's settings are in its checkpoints, with this folder
        size = sum(map(len, judge.sound[3].values()))
        for level in range(LEVELS):
            _reset(small / "run", aside)
            room = size * level * 3 // 2 // (LEVELS - 1)
            (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - room))
            codes[os.waitstatus_to_exitcode(os.waitpid(forked(saver.save), 0)[1])] += 1
            outcomes[judge()] += 1
            (small / "filler").unlink()
    finally:
        saver.trainer.args.output_dir = kept
        subprocess.run(["umount", str(small)], check=True)
    return {"levels": LEVELS, "outcomes": dict(outcomes), "exit_codes": dict(codes)}


def _reset(run_dir: Path, aside: Path) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(aside, run_dir)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
