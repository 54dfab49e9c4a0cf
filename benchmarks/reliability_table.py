"""The table of benchmarks/results/reliability.json in docs: `python -m benchmarks.reliability_table` prints it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from . import results
from .saves import ENDS

LOST = ("nothing to resume from", "broken one taken, cannot resume")
CHANGED = "broken one taken, goes on otherwise"


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """A row a fault: what becomes of a run of transformers' Trainer, and of one of this package."""
    yield "| fault | transformers' Trainer | mantis_lite |"
    yield "|---|---|---|"
    kills = figures["killed"]["mantis_lite"]["kills"]
    yield _row(f"killed {kills} times at random moments, saving every step", figures["killed"], _killed)
    for end, words in zip(ENDS, ("killed before each", "no space at each", "an I/O error at each"), strict=True):
        yield _row(
            f"{words} system call of a save", figures["saving"], lambda side, end=end: _calls(side["calls"], end)
        )
    yield _row("disk filled to 20 levels", figures["saving"], lambda side: _full(side["full_disk"]))
    count = sum(figures["flipped"]["mantis_lite"].values())
    yield _row(f"{count} bits flipped in the newest checkpoint", figures["flipped"], _flipped)
    yield _row("SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP, 10 times each", figures["signalled"], _signalled)
    yield _row("weights become NaN", figures["poisoned"], lambda side: _poisoned(side["weights"]))
    yield _row("one gradient is NaN", figures["poisoned"], lambda side: _poisoned(side["gradient"]))
    yield _row("killed at each step of an epoch, and gone on", figures["resumed"], _resumed)
    yield _row("a token of the hub", figures["secret"], _secret)
    yield _row("a DataLoader worker killed once", figures["bereft"], _bereft)


def _row(fault: str, sides: dict[str, Any], words: Any) -> str:
    return f"| {fault} | {words(sides['stock'])} | {words(sides['mantis_lite'])} |"


def _killed(found: dict[str, Any]) -> str:
    blocked = f"{found['cannot_resume']} cannot resume, of {found['kills_in_a_save']} that fell in a save"
    otherwise, lost = found["runs_that_ended_otherwise"], found["lost_steps_at_most"]
    ended = found["runs"] - found["cannot_resume"]
    return f"{blocked}; {otherwise} of the {ended} that ended differ; steps lost at most: {lost}"


def _calls(found: dict[str, Any], end: str) -> str:
    if "skipped" in found:
        return found["skipped"]
    outcomes = found[end]["outcomes"]
    lost, changed = sum(outcomes.get(key, 0) for key in LOST), outcomes.get(CHANGED, 0)
    also = f", {changed} go on otherwise" if changed else ""
    return f"{lost} of {found['boundaries']} cannot resume{also}{_exits(found[end])}"


def _full(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return found["skipped"]
    lost = sum(found["outcomes"].get(key, 0) for key in LOST)
    return f"{lost} of {found['levels']} cannot resume{_exits(found)}"


def _exits(found: dict[str, Any]) -> str:
    """The codes that what failed has ended with."""
    codes = sorted(int(code) for code in found["exit_codes"] if int(code) > 0)
    return f"; exit {', '.join(map(str, codes))} where it failed" if codes else ""


def _flipped(found: dict[str, int]) -> str:
    return "; ".join(f"{count} {outcome}" for outcome, count in sorted(found.items(), key=lambda item: -item[1]))


def _signalled(found: dict[str, dict[str, int]]) -> str:
    ends = [
        (int(outcome.split()[1].rstrip(",")), outcome.endswith("saved"), count)
        for each in found.values()
        for outcome, count in each.items()
        if outcome.startswith("exit")
    ]
    saved = sum(count for _, kept, count in ends if kept)
    same = sum(each.get("goes on the same", 0) for each in found.values())
    exits = ", ".join(str(code) for code in sorted({code for code, _, _ in ends}) if code > 0)
    killed = ", or killed by the signal" if any(code < 0 for code, _, _ in ends) else ""
    trials = sum(count for _, _, count in ends)
    return f"{saved} of {trials} saved the step, {same} went on the same; exit {exits}{killed}"


def _poisoned(found: dict[str, Any]) -> str:
    logged = found["logged_from_step_3"]
    losses = ", ".join(loss if isinstance(loss, str) else f"{loss:.1f}" for loss in logged) or "no loss"
    return f"logs {losses}; {found['files_saved_with_nan']} files saved with NaN; exit {found['status']}"


def _resumed(found: dict[str, dict[str, int]]) -> str:
    plain = [each for kind, each in found.items() if not kind.startswith("augmented")]
    drawn = [each for kind, each in found.items() if kind.startswith("augmented")]
    words = f"{_others(plain)} later losses differ"
    return f"{words}, {_others(drawn)} where rows are augmented at random" if drawn else words


def _others(kinds: list[dict[str, int]]) -> str:
    return f"{sum(each['others'] for each in kinds)} of {sum(each['losses_after'] for each in kinds)}"


def _secret(found: dict[str, Any]) -> str:
    hits = sum(found["with_the_token"].values())
    refused = found["exit_code_of_a_token_in_the_settings"]
    where = f"in {hits} files in plain text ({', '.join(found['with_the_token'])})" if hits else "in no file"
    return f"{where}; refused among settings (exit {refused})" if refused else where


def _bereft(found: dict[str, Any]) -> str:
    return "begun anew, the same result" if found["the_same"] else f"{found['error']}, exit {found['status']}"


def main() -> None:
    print("\n".join(lines(json.loads((results.FOLDER / "reliability.json").read_text())["figures"])))


if __name__ == "__main__":
    main()
