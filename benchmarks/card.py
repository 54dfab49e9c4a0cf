"""The card that is measured on; where there is none, the CPU stands in for it and its memory counts as nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np
import torch

GIB = 1 << 30


def there() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if there() else "cpu"


def wait() -> None:
    """Until all that was asked of it is done."""
    if there():
        torch.cuda.synchronize()


def clean() -> None:
    """Give back what nothing holds: a trainer and its model hold each other, so the collector has to look."""
    gc.collect()
    if there():
        torch.cuda.empty_cache()


def forget_peaks() -> None:
    if there():
        torch.cuda.reset_peak_memory_stats()


def held() -> float:
    """GiB of tensors now."""
    return torch.cuda.memory_allocated() / GIB if there() else 0.0


def peaks() -> tuple[float, float]:
    """The most GiB of tensors since `forget_peaks`, and the most that the allocator had for them."""
    if not there():
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def limit(gib: float | None) -> None:
    """Let this process have no more than so many GiB for its tensors; None takes the limit away."""
    if there():
        whole = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else min(1.0, gib / whole))


def seconds(call: Callable[[int], object], repeats: int = 20, warm: int = 3) -> np.ndarray:
    """Seconds (repeats,) that a call takes by itself, given the number of the call: it can choose its inputs by it."""
    if not there():
        return np.array([_by_clock(call, at) for at in range(2)])
    for at in range(warm):
        call(at)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for at, (begin, end) in enumerate(events):
        begin.record()
        call(at)
        end.record()
    torch.cuda.synchronize()
    return np.array([begin.elapsed_time(end) / 1000 for begin, end in events])


def _by_clock(call: Callable[[int], object], at: int) -> float:
    begun = time.perf_counter()
    call(at)
    return time.perf_counter() - begun


def spread(name: str, values: np.ndarray, digits: int = 4) -> dict[str, float]:
    """Median, least and most of a measure, by name."""
    edges = {"median": np.median(values), "min": values.min(), "max": values.max()}
    return {f"{name}_{edge}": round(float(value), digits) for edge, value in edges.items()}
