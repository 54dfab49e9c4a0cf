"""Workers of torch's DataLoader that die, by the system's want of memory or of their own."""

from __future__ import annotations

import re
import signal
import threading
from traceback import clear_frames
from typing import Any

MOST_DEATHS = 3
"""So many are forgiven before what they were at is given up."""


TOLD = (RuntimeError, ConnectionError, EOFError)
"""How it is heard of: by torch's own words, or by a batch that breaks off as it is handed over."""


def died(error: Exception) -> set[int]:
    """The processes whose death an error tells of, as far as it knows them. Raises any other error.

    Deaths have no type of their own; what a worker raises itself comes as "Caught ... in DataLoader worker".

    The frames of the error are cleared, with which the loader's other workers end. Kept until garbage is collected,
    they would be told to end by queues that are closed already, and each waited for.
    """
    found = re.search(r"^DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)|^Pin memory thread exited", str(error))
    broken_off = isinstance(error, ConnectionError | EOFError) and not str(error).startswith("Caught ")
    if not (found or broken_off):
        raise error
    clear_frames(error.__traceback__)
    if not found:
        return set()
    return {int(process) for process in (found[1] or "").split(",") if process}


def hear_in_turn() -> Any:
    """Hear of a death when a batch is asked for: torch raises it wherever this process is, with half a batch counted.

    Returns what heard of it before, for `signal.signal`; None where nothing was changed.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python hears no signals
        return None
    heard = signal.getsignal(signal.SIGCHLD)
    if heard is not None:  # what is not Python's could not be put back
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return heard
