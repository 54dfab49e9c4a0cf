"""The packs of a run as the dataset that the trainer walks through once, encoded as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow
from torch.nn.functional import pad

from ..errors import SampleError
from .collate import Batch, collate
from .encode import IGNORE, Encoded, Encoder
from .packs import BLANK, Packs
from .vision import Vision

MOST_IN_A_ROW = 100
"""Samples that cannot be encoded, one after the other: a disk is gone then, rather than pictures broken."""


def pack_dataset(
    packs: Packs,
    samples: Sequence[Any],
    encoder: Encoder,
    broken: Callable[[SampleError], None],
    targets: np.ndarray | None = None,
    doing: Callable[[int], None] | None = None,
    touch: bool = False,
    fewest: int = 1,
) -> datasets.Dataset:
    """A datasets.Dataset with a row a pack, encoded when it is asked for: pixels are decoded nowhere else.

    `broken` is told of a picture or clip whose header was sound and whose pixels are not; where it returns, the pack
    goes on without that sample. A pack with no other becomes a stand-in without loss, so that the step has a batch.
    More than MOST_IN_A_ROW such samples are an error all the same. `targets` (S, ...) are what a score head is to say
    of the samples. `doing` is told of each before it is encoded. With `touch` a pack that has lost its pictures gets a
    blank one, as those have that never had any. A pack has `fewest` tokens at least, filled up without loss.
    """
    encode = _Encode(samples, encoder, broken, targets, doing, touch, fewest)
    features = datasets.Features({"pack": datasets.List(datasets.Value("int32"))})
    offsets = pyarrow.array(np.concatenate([[0], packs.ends]), pyarrow.int32())
    column = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(packs.members))
    return datasets.Dataset.from_dict({"pack": column}, features=features).with_transform(encode)


def collate_packs(rows: list[dict[str, list[Encoded]]], vision: Vision, stretch: int = 0, sequence: int = 1) -> Batch:
    """The collator of `pack_dataset`'s rows: one pack, or several laid end to end.

    Where `sequence` processes share it, `shift_labels` is what this one's `stretch` of the row is to predict.
    """
    batch = collate([sample for row in rows for sample in row["encoded"]], vision.batch)
    if sequence > 1:  # the last token of a stretch predicts the first of the next
        ahead = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        batch["shift_labels"] = ahead.tensor_split(sequence, dim=1)[stretch]
    return batch


@dataclass
class _Encode:
    """Rows of packs -> their samples' tensors; `failed` samples in a row could not be encoded."""

    samples: Sequence[Any]
    encoder: Encoder
    broken: Callable[[SampleError], None]
    targets: np.ndarray | None
    doing: Callable[[int], None] | None
    touch: bool
    fewest: int
    failed: int = 0

    def __call__(self, rows: dict[str, list[list[int]]]) -> dict[str, list[list[Encoded]]]:
        return {"encoded": [self._pack(pack) for pack in rows["pack"]]}

    def _pack(self, pack: list[int]) -> list[Encoded]:
        found = [self._sample(index) for index in pack if index != BLANK]
        encoded = [sample for sample in found if sample is not None]
        if BLANK in pack or (self.touch and not any(sample.pixels for sample in encoded)):
            encoded.append(self._without_loss(self.encoder.blank()))
        while sum(map(len, encoded)) < self.fewest:
            encoded.append(self._without_loss(self.encoder.nothing()))
        return encoded

    def _without_loss(self, encoded: Encoded) -> Encoded:
        return encoded if self.targets is None else replace(encoded, target=_unknown(self.targets[0]))

    def _sample(self, index: int) -> Encoded | None:
        if self.doing is not None:
            self.doing(index)
        try:
            encoded = self.encoder.encode(self.samples[index])
        except SampleError as error:
            self.broken(error)
            self.failed += 1
            if self.failed > MOST_IN_A_ROW:
                found = f"the last of {self.failed} rows in a row that cannot be read: {error.found}"
                raise SampleError(error.where, found, error.remedy, error.sample_id) from None
            return None
        self.failed = 0
        return encoded if self.targets is None else replace(encoded, target=self.targets[index])


def _unknown(target: np.ndarray) -> np.ndarray:
    """A target of no sample: no score is right or wrong by it."""
    return np.full_like(target, IGNORE if np.issubdtype(target.dtype, np.integer) else np.nan)
