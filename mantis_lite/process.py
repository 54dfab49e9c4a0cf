"""What a process is told before it trains or answers, of the libraries it stands on; its cores; and how it ends."""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn


def prepare_process() -> None:
    """Quiet what is not the user's concern, and report nothing home; before torch is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait spinning cripple torch on a busy CPU
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # packs differ, and would leave gaps on a card
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\..*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Its own level is set as it is imported; it says on stdout, among a run's JSON lines, that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(_is_an_error)
    # What is wrong with a file is told once, in our words; pictures are refused at half the size that Pillow warns of.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")


def cores() -> int:
    """How many cores this process may use: those it may run on, or as many as its container's quota comes to."""
    runs_on = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(runs_on, quota_of(Path("/sys/fs/cgroup")) or runs_on)


def quota_of(group: Path) -> int | None:
    """The cores that a control group's quota of their time comes to, by either version of Linux' own, if it has one."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        if all((group / name).is_file() for name in names):
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if int(period) > 0 and quota.isdigit():  # or "max", or -1
                return max(1, math.ceil(int(quota) / int(period)))
    return None


def leave(code: int) -> NoReturn:
    """End the process as `sys.exit` does, but leave its memory to the system, as mypy does (its `hard_exit`).

    To take all objects of torch and transformers apart one by one takes more than a second.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_an_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
