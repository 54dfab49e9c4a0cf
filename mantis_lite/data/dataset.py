"""Samples and a budget -> the packs of a whole run, in order, as the dataset the trainer walks through once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from ..errors import DataError, RecipeError, SampleError
from ..recipe import PackingRecipe
from .collate import Batch, collate
from .encode import IGNORE, Encoded, Encoder
from .packing import Length, plan
from .prepare import Samples
from .vision import Vision
from .windows import windows

MOST_IN_A_ROW = 100
"""Samples that cannot be encoded, one after the other: a disk is gone then, rather than pictures broken."""


@dataclass(frozen=True)
class Schedule:
    """Every pack of a run in training order, and how many packs each epoch has that the run begins."""

    packs: list[list[int]]
    epoch_sizes: list[int]
    accumulation: int

    @property
    def steps(self) -> int:
        return math.ceil(len(self.packs) / self.accumulation)

    def epoch(self, step: int) -> float:
        """Epochs done after a number of optimizer steps."""
        left = min(step * self.accumulation, len(self.packs))
        for done, size in enumerate(self.epoch_sizes):
            if left < size:
                return done + left / size
            left -= size
        return float(len(self.epoch_sizes))


def pack_epoch(samples: Samples, packing: PackingRecipe, epoch: int = 0) -> list[list[int]]:
    """The packs of one epoch, by seed and epoch; one sample a pack where packing is off."""
    packs: list[list[int]] = []
    for indices in windows(samples, _draw(samples, packing.seed, epoch), packing.seed, epoch):
        packs += _packs(samples, indices, packing, epoch)
    return packs


def _packs(samples: Samples, indices: np.ndarray, packing: PackingRecipe, epoch: int) -> list[list[int]]:
    if packing.enabled:
        budget = Length(packing.max_length, packing.max_patches or 0)
        return [indices[pack].tolist() for pack in plan(samples.lengths[indices], budget, packing.seed, epoch)]
    return [[i] for i in np.random.default_rng((packing.seed, epoch)).permutation(indices).tolist()]


def schedule(samples: Samples, packing: PackingRecipe, train: dict[str, Any]) -> Schedule:
    """Lay out all packs of a run: `num_train_epochs` of them, or enough for `max_steps`."""
    first = pack_epoch(samples, packing)
    if not first:
        raise DataError("data: the sources' weights leave no row in an epoch\n  Raise the weight of one of them.")
    if float(train.get("num_train_epochs", 3)) <= 0 and train.get("max_steps", -1) <= 0:
        raise RecipeError("train.num_train_epochs: expected more than 0\n  Set it, or train.max_steps.")
    accumulation = _accumulation(samples, first, train)
    epochs, max_packs = float(train.get("num_train_epochs", 3)), train.get("max_steps", -1) * accumulation
    packs: list[list[int]] = []
    sizes: list[int] = []
    while len(packs) < max_packs if max_packs > 0 else len(sizes) < epochs:
        new = pack_epoch(samples, packing, len(sizes)) if sizes else _costliest_early(first, samples, accumulation)
        share = 1.0 if max_packs > 0 else min(1.0, epochs - len(sizes))
        packs += new[: math.ceil(len(new) * share)]
        sizes.append(len(new))
    return Schedule(packs[:max_packs] if max_packs > 0 else packs, sizes, accumulation)


def _costliest_early(packs: list[list[int]], samples: Samples, accumulation: int) -> list[list[int]]:
    """An epoch's packs, the two costliest first in the first two steps: a run that does not fit fails at once.

    By tokens and patches, each as a share of the most. In the second step the optimiser's moments are there as well.
    """
    costs = np.array([samples.lengths[pack].sum(0) for pack in packs], dtype=np.float64)
    order = (costs / np.maximum(costs.max(0), 1)).sum(1).argsort(kind="stable")[::-1].tolist()
    if len(packs) <= max(1, accumulation):
        return packs
    early = order[:2]
    rest = [pack for at, pack in enumerate(packs) if at not in early]
    rest.insert(0, packs[early[1]])
    rest.insert(accumulation, packs[early[0]])
    return rest


def pack_dataset(
    packs: list[list[int]],
    samples: Sequence[Any],
    encoder: Encoder,
    broken: Callable[[SampleError], None],
    targets: np.ndarray | None = None,
    doing: Callable[[int], None] | None = None,
) -> datasets.Dataset:
    """A datasets.Dataset with a row a pack, encoded when it is asked for: pixels are decoded nowhere else.

    `broken` is told of a picture or clip whose header was sound and whose pixels are not; where it returns, the pack
    goes on without that sample. A pack with no other becomes a stand-in without loss, so that the step has a batch.
    More than MOST_IN_A_ROW such samples are an error all the same. `targets` (S, ...) are what a score head is to say
    of the samples. `doing` is told of each before it is encoded.
    """
    encode = _Encode(samples, encoder, broken, targets, doing)
    features = datasets.Features({"pack": datasets.List(datasets.Value("int64"))})
    return datasets.Dataset.from_dict({"pack": packs}, features=features).with_transform(encode)


def collate_packs(rows: list[dict[str, list[Encoded]]], vision: Vision) -> Batch:
    """The collator of `pack_dataset`'s rows: one pack, or several laid end to end."""
    return collate([sample for row in rows for sample in row["encoded"]], vision.batch)


@dataclass
class _Encode:
    """Rows of packs -> their samples' tensors; `failed` samples in a row could not be encoded."""

    samples: Sequence[Any]
    encoder: Encoder
    broken: Callable[[SampleError], None]
    targets: np.ndarray | None
    doing: Callable[[int], None] | None
    failed: int = 0

    def __call__(self, rows: dict[str, list[list[int]]]) -> dict[str, list[list[Encoded]]]:
        return {"encoded": [self._pack(pack) for pack in rows["pack"]]}

    def _pack(self, pack: list[int]) -> list[Encoded]:
        found = [self._sample(index) for index in pack]
        if encoded := [sample for sample in found if sample is not None]:
            return encoded
        nothing = self.encoder.nothing()
        return [nothing if self.targets is None else replace(nothing, target=_unknown(self.targets[0]))]

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


def _draw(samples: Samples, seed: int, epoch: int) -> np.ndarray:
    """Indices of one epoch: each source's samples as often as its weight says, a broken share drawn by chance."""
    random = np.random.default_rng((seed, epoch, 1))
    drawn = []
    for source, weight in enumerate(samples.weights):
        members = np.flatnonzero(samples.source == source)
        whole, share = int(weight), weight - int(weight)
        drawn += [members] * whole
        drawn.append(random.permutation(members)[: round(len(members) * share)])
    return np.concatenate(drawn)


def _accumulation(samples: Samples, packs: list[list[int]], train: dict[str, Any]) -> int:
    """Packs in an optimizer step, from the step's size in samples or tokens and the average pack's."""
    if "samples_per_step" in train:
        size = sum(map(len, packs)) / len(packs)
        return max(1, round(train["samples_per_step"] / size))
    if "tokens_per_step" in train:
        size = sum(samples.lengths[pack, 0].sum() for pack in packs) / len(packs)
        return max(1, round(train["tokens_per_step"] / size))
    return train.get("gradient_accumulation_steps", 1)
