"""What a user can get wrong, each with the exit code the command line ends with."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from signal import Signals


def one_line(error: Exception) -> str:
    """What another library says is wrong, short enough for one line of a message."""
    return " ".join(str(error).split())[:300]


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """The nearest known name, by the whole dotted name or by its last word alone."""
    known = list(known)
    leaf = found.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == leaf] or difflib.get_close_matches(found, known, 1)
    leaves = {name.rpartition(".")[2]: name for name in known}
    near = near or [leaves[match] for match in difflib.get_close_matches(leaf, leaves, 1, 0.75)]
    return f"; did you mean {near[0]}?" if near else ""


class MantisError(ValueError):
    """A mistake a user can mend; the message says where, what was found and what to do."""

    exit_code = 1


class RecipeError(MantisError):
    """A recipe key or value that cannot be honoured."""

    exit_code = 2


class DataError(MantisError):
    """A data source, as a whole, that cannot be read."""

    exit_code = 3


class SampleError(DataError):
    """One row that cannot be trained on, named by file, row and id.

    `where` is "train.jsonl:12", `found` says what is wrong and `remedy` what to do about it.
    """

    def __init__(self, where: str, found: str = "", remedy: str = "", sample_id: str | None = None) -> None:
        self.where, self.found, self.remedy, self.sample_id = where, found, remedy, sample_id
        named = f'{where} (id "{sample_id}")' if sample_id is not None else where
        # torch raises a DataLoader worker's error anew from the text of its traceback, as the only argument.
        super().__init__(
            f"{named}: {found}\n  {remedy}" if found else re.split(r"^[\w.]*Error: ", where, flags=re.M)[-1].strip()
        )

    def __reduce__(self):  # an error raised in a DataLoader worker is pickled on its way to the user
        return type(self), (self.where, self.found, self.remedy, self.sample_id)


class OutOfMemory(MantisError):
    """A step that the card has no room for."""

    exit_code = 4


class FitError(SampleError):
    """One row that is larger than a pack."""


class DivergedError(MantisError):
    """A run whose numbers are of no use any more, or in which what should train does not."""

    exit_code = 5


class DiskError(MantisError):
    """A disk that is full, or cannot be written."""

    exit_code = 6


class ResumeError(MantisError):
    """A run's folder that is in use, or holds a run that cannot go on as it was asked to."""

    exit_code = 7


class CheckError(MantisError):
    """A check that failed: what was made is not what it was made from."""

    exit_code = 8


class Stopped(Exception):
    """A run that a signal stopped; it goes on from `checkpoint` when it is started again."""

    def __init__(self, signal: int, checkpoint: Path | None) -> None:
        self.signal, self.checkpoint = signal, checkpoint
        kept = f"saved {checkpoint}; run the same command to go on" if checkpoint else "before the first step"
        super().__init__(f"stopped by {Signals(signal).name}: {kept}")

    @property
    def exit_code(self) -> int:
        return 128 + self.signal
