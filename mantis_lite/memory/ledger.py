"""Bytes that are alive while a step is walked through with tensors that have shapes and no numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .shapes import Shape, run

BLOCK = 512
"""Bytes that torch's CUDA allocator rounds a tensor up to (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""


class Ledger(TorchDispatchMode):
    """Counts every new storage under the `term` of the moment until its last tensor is gone.

    `peaks` is what was alive by term when most was, in each `phase` of the step. `block` is what a tensor is rounded up
    to, in bytes, 1 for none.
    """

    def __init__(self, block: int = BLOCK) -> None:
        super().__init__()
        self.block, self.term, self.phase = block, "other", "forward"
        self.alive: dict[int, tuple[int, str, ref]] = {}
        self.terms: Counter[str] = Counter()
        self.now = 0
        self.held: list[torch.Tensor] = []
        self.most: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}

    @contextmanager
    def under(self, term: str) -> Iterator[None]:
        """Count what comes alive here under this term."""
        before, self.term = self.term, term
        try:
            yield
        finally:
            self.term = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run(func, args, kwargs or {})
        for found in out if isinstance(out, list | tuple) else (out,):
            if isinstance(found, Shape):
                self._enter(found)
        return out

    def _enter(self, tensor: Shape) -> None:
        storage = tensor.on_meta.untyped_storage()
        if storage._cdata in self.alive:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self.alive[storage._cdata] = (size, self.term, ref(storage, partial(self._leave, storage._cdata)))
        self.terms[self.term] += size
        self.now += size
        if self.now > self.most[self.phase]:
            self.most[self.phase], self.peaks[self.phase] = self.now, self.terms.copy()

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count these, and views of them, nowhere: weights are counted by themselves."""
        for tensor in tensors:
            assert isinstance(tensor, Shape)
            storage = tensor.on_meta.untyped_storage()
            if storage._cdata in self.alive:
                self._leave(storage._cdata)
            self.alive[storage._cdata] = (0, self.term, ref(storage, partial(self._leave, storage._cdata)))

    def hold(self, *tensors: torch.Tensor) -> None:
        """Keep these alive to the end of the step."""
        self.held += tensors

    def move(self, tensor: torch.Tensor, term: str) -> None:
        """Count what is alive already under another term."""
        assert isinstance(tensor, Shape)
        key = tensor.on_meta.untyped_storage()._cdata
        if key in self.alive:
            size, before, watch = self.alive[key]
            self.terms[before] -= size
            self.terms[term] += size
            self.alive[key] = (size, term, watch)

    def _leave(self, key: int, dead: ref | None = None) -> None:
        size, term, _ = self.alive.pop(key)
        self.terms[term] -= size
        self.now -= size
