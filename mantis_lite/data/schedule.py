"""Samples and a budget -> the packs of a whole run, in order, and the steps they make on any number of GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import DataError, RecipeError
from ..recipe import PackingRecipe
from .balance import LIMIT, group
from .cost import Cost
from .packing import Length, add_blanks, plan, spread
from .packs import BLANK, Packs
from .prepare import Samples
from .windows import windows

OFF = 0.05
"""By how much of what was asked a step may be off before that is said."""


@dataclass(frozen=True)
class Schedule:
    """Every pack of a run in training order, how many of them a step has, and each epoch has that the run begins.

    `per_step` is over all GPUs, a multiple of `balance`: so many packs, one after the other, are alike in cost. A pack
    without pictures has a blank one of `touch` tokens, unless that is None. `notices` say where a step is not as asked.
    """

    packs: Packs
    epoch_sizes: list[int]
    per_step: int
    balance: int = 1
    touch: int | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return math.ceil(len(self.packs) / self.per_step)

    def epoch(self, step: int) -> float:
        """Epochs done after a number of optimizer steps."""
        left = min(step * self.per_step, len(self.packs))
        for done, size in enumerate(self.epoch_sizes):
            if left < size:
                return done + left / size
            left -= size
        return float(len(self.epoch_sizes))

    def accumulation(self, ranks: int) -> int:
        """Micro-steps of a step: packs that each of so many GPUs takes one after the other."""
        return math.ceil(self.per_step / ranks)

    def laid_out(self, ranks: int, sequence: int = 1) -> Packs:
        """The packs with each step's filled up to a multiple of `ranks`, by packs without a sample and without loss.

        The GPU `rank` takes entry (step * accumulation(ranks) + micro_step) * ranks + rank. Where `sequence` GPUs share
        a pack, it is there for each of them, and `ranks` counts the packs that are worked on at once.
        """
        packs = self._filled_up(ranks)
        return packs if sequence == 1 else packs.take(np.repeat(np.arange(len(packs)), sequence))

    def _filled_up(self, ranks: int) -> Packs:
        count, width = len(self.packs), self.accumulation(ranks) * ranks
        last = count % self.per_step
        if width == self.per_step and last % ranks == 0:
            return self.packs
        whole = np.full((count // self.per_step, width), count)  # the place of the pack that fills up
        whole[:, : self.per_step] = np.arange(count - last).reshape(-1, self.per_step)
        rest = np.full(-(-last // ranks) * ranks, count)
        rest[:last] = np.arange(count - last, count)
        nothing = Packs.of([[] if self.touch is None else [BLANK]])
        return Packs.join([self.packs, nothing]).take(np.concatenate([whole.ravel(), rest]))


def pack_epoch(samples: Samples, packing: PackingRecipe, epoch: int = 0, touch: int | None = None) -> Packs:
    """The packs of one epoch, by seed and epoch; one sample a pack where packing is off.

    With `touch`, those without pictures have a blank one of so many tokens.
    """
    return Packs.join(_windows(samples, packing, epoch, touch))


def _windows(samples: Samples, packing: PackingRecipe, epoch: int, touch: int | None) -> list[Packs]:
    """The packs of an epoch, by the windows in which shards are fetched; all in one where none are."""
    drawn = windows(samples, _draw(samples, packing.seed, epoch), packing.seed, epoch)
    return [_pack(samples, indices.astype(np.int32), packing, epoch, touch) for indices in drawn]


def _pack(samples: Samples, indices: np.ndarray, packing: PackingRecipe, epoch: int, touch: int | None) -> Packs:
    if packing.enabled:
        packs = plan(samples.lengths[indices], _budget(packing), packing.seed, epoch, touch)
        return _of_samples(packs, indices)
    members = np.random.default_rng((packing.seed, epoch)).permutation(indices)
    packs = Packs(members, np.arange(1, len(members) + 1))
    return packs if touch is None else add_blanks(packs, samples.lengths[:, 1])


def schedule(
    samples: Samples,
    packing: PackingRecipe,
    train: dict[str, Any],
    ranks: int = 1,
    touch: int | None = None,
    cost: Cost | None = None,
) -> Schedule:
    """Lay out all packs of a run: `num_train_epochs` of them, or enough for `max_steps`.

    As many packs in a row as GPUs take at once are alike in `cost`, but for those at the end of the run that are fewer.
    Packs that have no such group in their epoch are in the next. Raises DataError where no sample is drawn, and
    RecipeError where no epoch is asked for.
    """
    first = _windows(samples, packing, 0, touch)
    if not any(map(len, first)):
        raise DataError("data: the sources' weights leave no row in an epoch\n  Raise the weight of one of them.")
    epochs, max_steps = float(train.get("num_train_epochs", 3)), train.get("max_steps", -1)
    if epochs <= 0 and max_steps <= 0:
        raise RecipeError("train.num_train_epochs: expected more than 0\n  Set it, or train.max_steps.")
    balance = ranks if packing.balance == "auto" else packing.balance
    per_step, notices = _per_step(samples, Packs.join(first), train, balance)
    groups = _Groups(samples, packing, balance, touch, cost or Cost())
    parts: list[Packs] = []
    sizes: list[int] = []
    while sum(sizes) < max_steps * per_step if max_steps > 0 else len(sizes) < epochs:
        epoch = len(sizes)
        each = first if epoch == 0 else _windows(samples, packing, epoch, touch)
        new = Packs.join([groups.of(packs, epoch) for packs in each])
        parts.append(_costliest_early(new, samples, per_step, balance) if epoch == 0 else new)
        sizes.append(len(new))
    if max_steps > 0:
        packs = Packs.join(parts)[: max_steps * per_step]
    else:
        sizes[-1] += len(groups.left)
        packs = Packs.join([*parts, groups.left])
        begun = math.ceil(sizes[-1] * min(1.0, epochs - len(sizes) + 1))  # of the last epoch
        packs = packs[: len(packs) - sizes[-1] + begun]
    return Schedule(packs, sizes, per_step, balance, touch, [*notices, *groups.notices])


@dataclass
class _Groups:
    """Epochs' packs in groups of `size` that are alike in cost; `left` are those that have none, so far."""

    samples: Samples
    packing: PackingRecipe
    size: int
    touch: int | None
    cost: Cost
    left: Packs = field(default_factory=lambda: Packs.of([]))
    made: int = 0
    unlike: int = 0

    def of(self, packs: Packs, epoch: int) -> Packs:
        """The groups of an epoch's packs and those that were left, end to end."""
        if self.size == 1:
            return packs
        random = np.random.default_rng((self.packing.seed, epoch, 2))
        repack = self._repack if self.packing.enabled else None
        found = group(Packs.join([self.left, packs]), self.size, self._costs, repack, random)
        self.left = found.left
        self.made += len(found.packs) // self.size
        self.unlike += found.unlike
        return found.packs

    @property
    def notices(self) -> list[str]:
        """What is to be said of groups that are not alike."""
        if not self.unlike:
            return []
        what = f"{self.unlike:,} of {self.made:,} times that {self.size} packs are worked on at once"
        return [f"{what}, one costs over {LIMIT:.0%} more than their mean: the other GPUs wait for it"]

    def _costs(self, packs: Packs) -> np.ndarray:
        blank = self.cost.of(np.array([[self.touch or 0, 0]]))[0]
        return packs.sums(self._of_samples, blank)

    @cached_property
    def _of_samples(self) -> np.ndarray:
        return self.cost.of(self.samples.lengths)

    def _repack(self, indices: np.ndarray, cost: float) -> Packs:
        lengths = self.samples.lengths[indices]
        packs = spread(lengths, self._of_samples[indices], cost, _budget(self.packing), self.touch)
        return _of_samples(packs, indices)


def _costliest_early(packs: Packs, samples: Samples, per_step: int, balance: int) -> Packs:
    """An epoch's packs, the two costliest groups first in the first two steps: a run that does not fit fails at once.

    By tokens and patches, each as a share of the most. In the second step the optimiser's moments are there as well.
    """
    if len(packs) <= per_step:
        return packs
    costs = packs.sums(samples.lengths).astype(np.float64)
    costs = (costs / np.maximum(costs.max(0), 1)).sum(1).reshape(-1, balance).max(1)
    order = costs.argsort(kind="stable")[::-1]
    rest = np.delete(np.arange(len(costs)), order[:2])
    groups = np.insert(rest, [0, per_step // balance - 1], order[[1, 0]])
    return packs.take((groups[:, None] * balance + np.arange(balance)).ravel())


def _budget(packing: PackingRecipe) -> Length:
    return Length(packing.max_length, packing.max_patches or 0)


def _of_samples(packs: Packs, indices: np.ndarray) -> Packs:
    """Packs of indices, where they were planned of places in these."""
    members = indices[packs.members]  # BLANK reads the last, which is replaced
    members[packs.members == BLANK] = BLANK
    return Packs(members, packs.ends)


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


def _per_step(samples: Samples, packs: Packs, train: dict[str, Any], balance: int) -> tuple[int, list[str]]:
    """Packs of an optimizer step, a multiple of `balance`; and, in words, where they are not what was asked for."""
    for key, held in (("samples_per_step", len(packs.samples)), ("tokens_per_step", _tokens(packs, samples))):
        if key in train:
            size = held / len(packs)
            asked = train[key] / size
            found = balance * max(1, round(asked / balance))
            return found, [] if abs(found - asked) <= OFF * asked else [_off(key, train[key], found, size, balance)]
    return balance * train.get("gradient_accumulation_steps", 1), []


def _tokens(packs: Packs, samples: Samples) -> int:
    return int(samples.lengths[packs.samples, 0].sum())


def _off(key: str, asked: int, found: int, size: float, balance: int) -> str:
    what = key.partition("_")[0]
    if found == balance:
        why = f"each of {balance} GPUs takes one at least" if balance > 1 else "it takes one at least"
    else:
        why = f"packs of a step are a multiple of {balance}" if balance > 1 else "packs are not divided"
    return (
        f"a step has {found:,} packs of about {found * size:,.0f} {what} in all, "
        f"and train.{key} asks for {asked:,}: {why}"
    )
