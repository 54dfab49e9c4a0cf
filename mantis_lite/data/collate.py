"""Encoded samples -> one row. The only place that builds a batch, because every mistake in one is silent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .encode import IGNORE, Encoded
from .vision import Pixels, lay_end_to_end

Batch = dict[str, Any]


def collate(
    samples: Sequence[Encoded], pictures: Callable[[Sequence[Pixels]], dict[str, Any]] = lay_end_to_end
) -> Batch:
    """Lay samples end to end in one row, so that none can attend to another.

    input_ids, labels (1, T), the first label of each sample -100; position_ids (1, T) restarting at 0 for each sample,
    or (1 + R, 1, T) where the family has R positions of its own; cu_seq_lens_q and _k (S + 1,) int32, the boundaries;
    max_length_q and _k, tokens of the longest sample; what `pictures` makes of all pictures in reading order, absent
    where no sample has one; `use_cache` False. Where samples have targets, labels are these, (S, L) or (S,).

    There is no attention_mask, and a cache must not be made: with either, transformers no longer looks for the
    restarts in position_ids and lets the samples see each other, without an error (tests/test_isolation.py).

    >>> a, b = (Encoded(np.array(ids), np.array(ids)) for ids in ([5, 6, 7], [8, 9]))
    >>> batch = collate([a, b])
    >>> batch["input_ids"], batch["labels"]
    (tensor([[5, 6, 7, 8, 9]]), tensor([[-100,    6,    7, -100,    9]]))
    >>> batch["position_ids"], batch["cu_seq_lens_q"]
    (tensor([[0, 1, 2, 0, 1]]), tensor([0, 3, 5], dtype=torch.int32))
    """
    lengths = [len(sample) for sample in samples]
    ends = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    batch: Batch = {
        "labels": _labels(samples),  # first: the trainer takes a batch's size, in evaluation, from its first tensor
        "input_ids": _row([sample.input_ids for sample in samples]),
        "position_ids": _positions(samples),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }
    pixels = [picture for sample in samples for picture in sample.pixels]
    return batch | (pictures(pixels) if pixels else {})


def _labels(samples: Sequence[Encoded]) -> torch.Tensor:
    targets = [sample.target for sample in samples if sample.target is not None]
    if targets:
        assert len(targets) == len(samples)
        return torch.from_numpy(np.stack(targets))
    return _row([np.where(np.arange(len(sample)) == 0, IGNORE, sample.labels) for sample in samples])


def _positions(samples: Sequence[Encoded]) -> torch.Tensor:
    """The restarting row alone, or above the family's own: transformers finds the samples of a pack by that row."""
    restarting = _row([np.arange(len(sample)) for sample in samples])
    own = [sample.positions for sample in samples if sample.positions is not None]
    if not own:
        return restarting
    assert len(own) == len(samples)
    return torch.cat([restarting, torch.from_numpy(np.concatenate(own, axis=1))])[:, None]


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts)[None])
