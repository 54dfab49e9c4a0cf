"""What a measurement was taken on, and where its figures go."""

from __future__ import annotations

import json
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "triton",
    "liger-kernel",
    "tokenizers",
    "datasets",
    "pillow",
    "av",
    "numpy",
    "simplejpeg",
)


def installed(name: str) -> str | None:
    """A package's version, where there is one: triton and liger-kernel are a GPU's, av may be missing there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The device, its software and the date."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "date": date.today().isoformat(),
        "device": device,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": dict(filter(all, ((name, installed(name)) for name in PACKAGES))),
    }


def write(name: str, figures: dict[str, Any], folder: Path | None = None) -> Path:
    """Write figures with the machine they were measured on; returns the file."""
    folder = folder or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(machine() | {"figures": figures}, indent=2) + "\n")
    return path
