"""What this package does on one NVIDIA GPU: the table G0-G12 of the project's notes on performance.

    python -m benchmarks.gpu [--only G3,G7] [--cases PATTERN] [--full] [--minutes 8.5] [--out FOLDER]
    python -m benchmarks.gpu --profile G3
    python -m benchmarks.gpu --tiny
    python -m benchmarks.gpu --estimates

Weights are random, in the shapes of Mantis-8B-siglip-llama3 and Mantis-8B-Idefics2; nothing is downloaded. Groups run
in the order of their worth, each in a process of its own; a case is not begun where too little is left of the time, and
the file is written anew after each. --cases takes those whose group and name match a regular expression, long ones too.
The allocator is asked for expandable segments, as commands do, unless PYTORCH_ALLOC_CONF is set. --profile shows where
one step of a group's first case goes. --tiny runs every case in small shapes on a CPU and keeps no figure. --estimates
adds to a file, on any machine, what `mantis-lite fit` says.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import card, results

ORDER = ("G0", "G3", "G2", "G1", "G7", "G5", "G6", "G10", "G9", "G8", "G11", "G4", "G12")
Figures = dict[str, Any]


class Group:
    """A process that waits for `go`, then writes a line for each case that begins or ends into a file."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path, deadline: float, first: int = 0) -> None:
        self.name = name
        self.lines, self.log = folder / f"{name}-{first}.jsonl", folder / f"{name}-{first}.log"
        self.lines.touch()
        asked = [flag for flag in ("tiny", "full", "profile") if getattr(args, flag)]
        words = [name, str(first), str(deadline), str(self.lines), args.cases, *asked]
        allocator = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        environment = allocator | os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_group", *words],
            stdin=subprocess.PIPE,
            stdout=None if args.profile else subprocess.DEVNULL,
            stderr=self.log.open("w"),
            env=environment | ({"CUDA_VISIBLE_DEVICES": ""} if args.tiny else {}),
            start_new_session=True,  # with the loader's workers, so that all of it can be ended
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Table:
    """All figures by group and case, in a file and on the screen."""

    def __init__(self, folder: Path, rows: dict[str, Figures] | None = None) -> None:
        self.folder, self.rows = folder, rows or {}

    def add(self, group: str, case: str, figures: Figures) -> None:
        rows = self.rows.setdefault(group, {})
        if "not run" not in figures or case not in rows:  # what was measured before is kept
            rows[case] = figures
        results.write("gpu", self.rows, self.folder)
        shown = {key: value for key, value in figures.items() if key not in ("setting", "losses")}
        shown |= {"failed": shown["failed"][-300:]} if "failed" in shown else {}
        print(f"{group} {case}: {json.dumps(shown)}", flush=True)


def follow(group: Group, table: Table, deadline: float) -> tuple[int, bool]:
    """Write down what a group says until it ends, or has to be: how many cases are done, and whether to go on."""
    read, begun, done = 0, None, 0
    group.go()
    while True:
        over = group.process.poll() is not None
        lines = group.lines.read_text().splitlines(keepends=True)
        for line in (line for line in lines[read:] if line.endswith("\n")):
            said, read = json.loads(line), read + 1
            if said["figures"] is None:
                begun = (said["case"], time.time() + 30 + 4 * said["seconds"])
            else:
                table.add(group.name, said["case"], said["figures"])
                begun, done = None, done + 1
        late = time.time() > min(deadline, begun[1] if begun else deadline)
        if over or late:
            break
        time.sleep(0.1)
    group.end()
    if begun is None and (done or group.process.returncode == 0):
        return done, False
    why = {"stopped": "it took too long"} if late and not over else {"failed": group.log.read_text()[-2000:]}
    table.add(group.name, begun[0] if begun else "before a case", why)
    return done + 1, begun is not None and time.time() < deadline


def run(args: argparse.Namespace) -> None:
    """All groups asked for, one after the other; the next is being started while one runs."""
    chosen = args.profile.split(",") if args.profile else args.only.split(",") if args.only else list(ORDER)
    deadline = time.time() + 60 * args.minutes
    groups: list[Group] = []
    with tempfile.TemporaryDirectory() as folder:
        kept = not (args.tiny or args.profile)
        table = Table(args.out, before(args.out) if args.only or args.cases else None) if kept else Table(Path(folder))
        try:
            groups.append(Group(chosen[0], args, Path(folder), deadline))
            for name in [*chosen[1:], None]:
                now = groups[-1]
                groups += [Group(name, args, Path(folder), deadline)] if name else []
                run_group(now, args, table, deadline, groups)
        finally:
            for group in groups:
                group.end()
    faults = [f"{group} {case}" for group, cases in table.rows.items() for case, row in cases.items() if bad(row)]
    print(f"{sum(map(len, table.rows.values()))} rows; at fault: {faults or 'none'}", flush=True)
    if args.tiny and faults:
        sys.exit(1)


def run_group(group: Group, args: argparse.Namespace, table: Table, deadline: float, groups: list[Group]) -> None:
    """Follow a group to its end; where a case ends the process, another goes on behind that case."""
    if time.time() > deadline:
        table.add(group.name, "all", {"not run": "time"})
        return
    done, more = follow(group, table, deadline)
    while more:
        again = Group(group.name, args, group.lines.parent, deadline, done)
        groups.insert(0, again)
        now, more = follow(again, table, deadline)
        done += now


def before(folder: Path) -> dict[str, Figures]:
    """What is measured already, where only some groups are to be; it must be of the same machine and versions."""
    file = folder / "gpu.json"
    if not file.is_file():
        return {}
    known, here = json.loads(file.read_text()), results.machine()
    if (known["device"], known["versions"]) != (here["device"], here["versions"]):
        sys.exit(f"{file} is of another machine or of other versions: name another folder with --out")
    return known["figures"]


def bad(row: Figures) -> bool:
    return bool({"failed", "fault", "stopped"} & row.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="groups, with commas between")
    parser.add_argument("--cases", default="", help="a regular expression of groups and cases: 'G7 idefics2'")
    parser.add_argument("--full", action="store_true", help="20 timed steps, and the long cases too")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    parser.add_argument("--profile", metavar="GROUP")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--estimates", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the groups are ended as well
    if args.estimates:
        from .gpu_estimates import add_estimates

        add_estimates(args.out / "gpu.json")
    elif args.tiny or card.there():
        run(args)
    else:
        parser.error("there is no NVIDIA GPU; --tiny runs all cases in small shapes without one")


if __name__ == "__main__":
    main()
