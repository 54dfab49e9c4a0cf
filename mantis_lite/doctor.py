"""A machine -> what of it counts for training, and what is checked on it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement  # transformers and accelerate need it too

from . import __version__
from .contract import versions
from .errors import CheckError
from .memory.card import card_at_hand
from .memory.estimate import GIB
from .models import attention
from .models.kernels import chosen_kernels
from .models.load import loader_workers
from .models.precision import working_dtype
from .secrets import VALUE
from .self_test import Check, checked, self_test, tiny_recipe

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
    "bitsandbytes": "0.50.2",
    "liger-kernel": "0.8.5",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "pillow": "13.0.0",
    "av": "18.1.0",
    "numpy": "2.4.6",
}
"""What this release was tested on: of what numbers depend on, the versions in constraints.txt."""
NAME = r"[^\s'\",;:()/]+"
"""A folder's, in a line of text."""
SHM = GIB
"""Bytes of /dev/shm that batches on their way from the workers need; a container has 64 MiB where nothing is said."""


@dataclass(frozen=True)
class Diagnosis:
    """What a machine has, in words by what it is; and what was checked on it."""

    facts: dict[str, str]
    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        if self.failed:
            return f"failed: {', '.join(check.name for check in self.failed)}"
        return f"all {len(self.checks)} checks are ok"


def doctor(test: bool = True) -> Diagnosis:
    """Look at this machine, and, with `test`, have Tiny Mantis train, go on, merge and be packed in a temporary folder.

    Raises nothing for what is wrong: that is what its checks say.
    """
    checks = [checked("packages", _packages), checked("GPU", _gpu)]
    if loader_workers():
        checks.append(checked("shared memory", _shared_memory))
    if test:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # matrices this small only wait for each other
        try:
            with tempfile.TemporaryDirectory(prefix="mantis-lite-") as folder:
                checks.extend(self_test(Path(folder)))
        finally:
            torch.set_num_threads(threads)
    return Diagnosis(dict(_facts()), checks)


def lines(diagnosis: Diagnosis) -> list[str]:
    """A diagnosis as text to show, and to paste into a bug report: no path of the machine is in it, and no token."""
    width = max(map(len, [*diagnosis.facts, *(check.name for check in diagnosis.checks)])) + 2
    told = [f"{name:{width}}{found}" for name, found in diagnosis.facts.items()]
    for check in diagnosis.checks:
        told.append(f"{check.name:{width}}{'ok' if check.passed else 'FAILED'}: {check.found}")
    return [public(line) for line in [*told, f"{'verdict':{width}}{diagnosis.verdict}"]]


def public(text: str) -> str:
    """A line without the folders of this machine, and none at all where it may hold a secret.

    >>> public("no such file: /home/ada/data/train.json")
    'no such file: .../train.json'
    """
    if VALUE.search(text):
        return "(a line that may hold a token is left out)"
    for folder in (Path.cwd(), Path.home()):  # in whole, as names may have blanks
        if folder.name:
            text = re.sub(rf"{re.escape(str(folder))}(?!\w)", "~", text)
    return re.sub(rf"(?<![\w.:/])(?:~|/{NAME})/(?:{NAME}/)*", ".../", text)


# What the machine has.


def _facts() -> Iterator[tuple[str, str]]:
    yield "mantis-lite", f"{__version__}, Python {platform.python_version()}"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    driver = _driver()
    yield "driver", f"NVIDIA {driver}" if driver else "none of NVIDIA's that answers"
    yield "computes in", _precision()
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}; {psutil.cpu_count()} CPUs"
    yield "disk here", _room(Path())
    yield "shared memory", _room(Path("/dev/shm"))
    for name, found in versions().items():
        if tested := TESTED.get(name):
            yield name, found if found.partition("+")[0] == tested else f"{found} (tested on {tested})"
    for kernel, does in attention.KERNELS.items():
        yield f"attention {kernel}", _or_why(attention.unavailable(kernel), does)
    for fused, why in chosen_kernels(tiny_recipe(Path(), Path())).items():
        yield f"kernel {fused}", _or_why(why, "available")
    for extra, missing in _extras().items():
        yield f"extra {extra}", f"not installed: {', '.join(missing)}" if missing else "installed"


def _or_why(why_not: str | None, does: str) -> str:
    return f"not available: {why_not}" if why_not else does


def _driver() -> str | None:
    """The NVIDIA driver's version by its own tool, which knows it also where torch is built for CPUs."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def _precision() -> str:
    """What training computes in: a GPU older than Ampere says that it has bfloat16, and emulates it."""
    name = str(working_dtype()).removeprefix("torch.")
    if working_dtype() == torch.float16:
        return f"{name}: bfloat16 is only emulated below capability 8.0"
    return f"{name}, which the GPU has" if torch.cuda.is_available() else f"{name}, on the CPU"


def _room(folder: Path) -> str:
    if not folder.is_dir():
        return "is not there"
    usage = shutil.disk_usage(folder)
    return f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f}"


def _extras() -> dict[str, list[str]]:
    """What each of the package's extras still needs; without that of its developers."""
    try:
        needed = [Requirement(line) for line in requires("mantis-lite") or ()]
        extras = metadata("mantis-lite").get_all("Provides-Extra") or []
    except PackageNotFoundError:  # told by the check of packages
        return {}
    found: dict[str, list[str]] = {}
    for extra in set(extras) - {"dev"}:
        own = [each for each in needed if each.marker and not each.marker.evaluate({"extra": ""})]
        found[extra] = list(_lacking(each for each in own if each.marker and each.marker.evaluate({"extra": extra})))
    return dict(sorted(found.items()))


def _lacking(needed: Iterator[Requirement]) -> Iterator[str]:
    """What is required and not here, or here in another version."""
    for each in needed:
        try:
            found = version(each.name)
        except PackageNotFoundError:
            yield f"{each.name} is not here"
            continue
        if not each.specifier.contains(found, prereleases=True):
            yield f"{each.name} {found}, where {each.specifier} is needed"


# What is checked.


def _gpu() -> str:
    """The GPU that torch sees; without one, that there is indeed none."""
    if (card := card_at_hand()) is not None:
        major, minor = torch.cuda.get_device_capability()
        kind = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, capability {major}.{minor}"
        return f"{kind}, CUDA {torch.version.cuda}; {card.words}"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "none: CUDA_VISIBLE_DEVICES hides it"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
    if driver := _driver():
        remedy = "Install the torch for this driver: https://pytorch.org/get-started/locally"
        raise CheckError(f"there is a driver, {driver}, but torch, built for {built}, sees no GPU\n  {remedy}")
    return f"none, and torch is built for {built}"


def _packages() -> str:
    needed = [Requirement(line) for line in requires("mantis-lite") or ()]
    own = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    if lacking := list(_lacking(iter(own))):
        raise CheckError(f"{'; '.join(lacking)}\n  Run pip install --upgrade mantis-lite.")
    return f"{len(own)} of {len(own)} in versions that are supported"


def _shared_memory() -> str:
    free = shutil.disk_usage("/dev/shm").free
    if free < SHM:
        remedy = "Start the container with --shm-size=2g, or set train.dataloader_num_workers=0."
        raise CheckError(f"{free / GIB:.2f} GiB are free, and {loader_workers()} workers need 1\n  {remedy}")
    return f"{free / GIB:.1f} GiB are free"
