"""The packs of a run that may be its largest: of its data, or assumed where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data import media
from ..data.chunks import too_large
from ..data.encode import Encoder
from ..data.lengths import Measured
from ..data.packing import needed
from ..data.packs import BLANK
from ..data.prepare import Samples
from ..data.schedule import Schedule, pack_epoch, schedule
from ..data.vision import Size, Vision, bounded
from ..errors import SampleError
from ..models.checkpoint import Checkpoint
from ..recipe import Recipe
from .step import Pack, grid

NEAR = 8
"""Packs of most patches whose pictures are looked at."""

NAMED = 3
"""Samples of a pack that are named."""

ASSUMED: Size = (640, 480)
"""The pictures of a pack that nothing is known of, in pixels."""

SAMPLES, PICTURES = 4, 2.6
"""Samples of a pack that nothing is known of, and pictures of a sample: Mantis-Instruct's mean."""

SHORT = 1024
"""Tokens that a pack is not made shorter than where nothing is known of its samples."""


@dataclass(frozen=True)
class Planned:
    """Rows that were read under a recipe, and their packs under it or another.

    `longest` is what a pack must hold, in tokens, for every sample to have a place; `held_out` are evaluated.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    encoder: Encoder
    samples: Samples
    plan: Schedule
    held_out: Samples | None = None

    @property
    def longest(self) -> int:
        both = [samples.lengths for samples in (self.samples, self.held_out) if samples is not None]
        return max(int(needed(lengths, self.plan.touch).max()) for lengths in both)

    @property
    def why_no_shorter(self) -> str:
        """Why packs are not made shorter than `longest`."""
        return f"A pack must hold the longest sample, of {self.longest:,} tokens"

    @property
    def side(self) -> int:
        """The longest side of a picture of the packs of most patches, in pixels; 0 where there is none."""
        packs = [self.plan.packs[at] for at in _candidates(self.plan, self.samples)]
        return max((max(size) for pack in packs for size in sizes(pack, self.samples, self.encoder)), default=0)

    def packs(self, recipe: Recipe) -> tuple[list[Pack], bool]:
        """The packs that may be the largest under a recipe, and whether a GPU has several of a step.

        Raises SampleError where a picture of theirs cannot be had under it.
        """
        samples, plan, encoder = self.samples, self._plan(recipe), self.encoder
        if recipe.media != self.recipe.media:
            encoder = self.checkpoint.encoder(recipe)
            samples = self._measured_again(encoder, recipe)
            plan = replace(plan, packs=pack_epoch(samples, recipe.packing, touch=plan.touch))
        gpus = recipe.launch.size
        return list(largest_packs(plan, samples, encoder, gpus).values()), plan.accumulation(gpus) > 1

    def _plan(self, recipe: Recipe) -> Schedule:
        """The packs under a recipe, as long as lengths are the same."""
        same = recipe.packing == self.recipe.packing
        if same:
            return self.plan
        return schedule(self.samples, recipe.packing, recipe.train, self.plan.balance, self.plan.touch)

    def words(self, recipe: Recipe) -> str:
        """What the largest pack is the largest of."""
        return f"the largest of the data's {len(self._plan(recipe).packs):,} packs"

    def where(self, pack: Pack) -> str:
        """Where the samples of a pack stand, the first few."""
        members = [index for index in pack.members if index != BLANK]
        named = [self.samples[index].where for index in members[:NAMED]]
        more = len(members) - len(named)
        return ", ".join(named) + (f" and {more:,} more" if more else "")

    def _measured_again(self, encoder: Encoder, recipe: Recipe) -> Samples:
        """The samples of the packs that may be the largest, under other media settings: the others come to less."""
        members = self.plan.packs.take(np.array(_candidates(self.plan, self.samples))).samples
        samples = replace(self.samples.take(np.unique(members)), weights=[1.0] * len(self.samples.weights))
        found: list[Measured] = []
        for sample, length in zip(samples, encoder.measure(list(samples)), strict=True):
            error = length if isinstance(length, SampleError) else too_large(sample, length, recipe.packing)
            if error is not None:
                raise error
            assert isinstance(length, Measured)
            found.append(length)
        lengths = np.array([(length.tokens, length.patches) for length in found], dtype=np.int64)
        return replace(samples, lengths=lengths)


@dataclass(frozen=True)
class Assumed:
    """Packs as full as they may be, of pictures of one size, where there is no data."""

    vision: Callable[[Recipe], Vision]

    longest = SHORT
    why_no_shorter = f"Without data, packs are taken to need {SHORT:,} tokens"
    side = max(ASSUMED)

    def packs(self, recipe: Recipe) -> tuple[list[Pack], bool]:
        """The assumed pack under a recipe, and whether a GPU has several of a step."""
        pack, _ = assumed(recipe, self.vision(recipe))
        return [pack], pack.waiting > 0

    def words(self, recipe: Recipe) -> str:
        """What is assumed."""
        return assumed(recipe, self.vision(recipe))[1]

    def where(self, pack: Pack) -> str:
        """Where the samples of a pack stand: nowhere."""
        return "assumed"


Rows = Planned | Assumed
"""What is known of the rows that a recipe trains on."""


def largest_packs(plan: Schedule, samples: Samples, encoder: Encoder, gpus: int = 1) -> dict[int, Pack]:
    """The packs that may be the largest, by their place in the plan: of most tokens, patches, pictures of one shape.

    Shapes are looked up in the NEAR packs of most patches: each is a header to be read.
    """
    totals = _totals(plan, samples)
    usual, beside = float(totals[:, 1].mean()), min(plan.accumulation(gpus), len(plan.packs)) - 1
    found = {}
    for at in _candidates(plan, samples):
        pack = pack_of(plan.packs[at], samples, encoder)
        found[at] = replace(pack, waiting=beside * usual / max(1, totals[at, 1]))
    ranks = (lambda p: p.tokens, lambda p: p.patches, lambda p: p.crowd)
    places = dict.fromkeys(max(found, key=lambda at: rank(found[at])) for rank in ranks)
    return {at: found[at] for at in places}


def pack_of(pack: Sequence[int], samples: Samples, encoder: Encoder) -> Pack:
    """Samples laid end to end: their tokens, those with loss, and their pictures' patches by their headers."""
    tokens = [encoder.blank_length().tokens if index == BLANK else int(samples.lengths[index, 0]) for index in pack]
    scored = sum(encoder.supervised(samples[index]) for index in pack if index != BLANK)
    pictures = sizes(pack, samples, encoder)
    grids = [each for size in pictures for each in grids_of(encoder.vision, size)]
    shown = sum(encoder.vision.placeholders(size) for size in pictures)
    return Pack(sum(tokens), max(tokens), max(1, scored), tuple(grids), shown=shown, members=tuple(pack))


def sizes(pack: Sequence[int], samples: Samples, encoder: Encoder) -> list[Size]:
    """The (width, height) of a pack's pictures, from their headers; and of a blank one."""
    laid_out = (encoder.frames.lay_out(samples[index]) for index in pack if index != BLANK)
    found = [media.size(image, sample, encoder.max_image_size) for sample in laid_out for image in sample.images]
    return [*found, encoder.blank_size] if BLANK in pack else found


def grids_of(vision: Vision, size: Size) -> Sequence[tuple[int, int]]:
    """Rows and columns of the tower's positions in each view of a picture; about so many where shapes do not matter."""
    return vision.views(size) if vision.views else [grid(vision.patches(size), size)]


def assumed(recipe: Recipe, vision: Vision) -> tuple[Pack, str]:
    """A full pack of as many pictures as there is room for; and what was assumed, in words."""
    tokens, cap = recipe.packing.max_length, recipe.media.max_image_size
    size = bounded(ASSUMED, cap, 1) if isinstance(cap, int) else ASSUMED
    each = sum(count for _, count in vision.tokens(size))
    count = tokens // each
    if recipe.packing.max_patches:
        count = min(count, recipe.packing.max_patches // vision.patches(size))
    step = _packs_a_step(recipe)
    each_gpu = f" on each of {recipe.launch.size} GPUs" if recipe.launch.size > 1 else ""
    shown = f"{count:,} pictures of {size[0]} x {size[1]} px"
    words = f"{tokens:,} tokens with {shown} in it, {step} packs a step{each_gpu}"
    waiting = (step - 1) * min(1.0, SAMPLES * PICTURES / max(1, count))
    views = tuple(grids_of(vision, size)) * count
    pack = Pack(tokens, tokens, max(1, tokens - count * each), views, waiting, count * vision.placeholders(size))
    return pack, f"assumed: a full pack of {words}"


def _packs_a_step(recipe: Recipe) -> int:
    """Packs of a step that each GPU takes."""
    train, gpus = recipe.train, recipe.launch.size
    if "samples_per_step" in train:
        return max(1, train["samples_per_step"] // SAMPLES // gpus)
    if "tokens_per_step" in train:
        return max(1, train["tokens_per_step"] // recipe.packing.max_length // gpus)
    return train.get("gradient_accumulation_steps", 1)


def _totals(plan: Schedule, samples: Samples) -> np.ndarray:
    """Tokens and patches of each pack, (P, 2)."""
    return plan.packs.sums(samples.lengths, [plan.touch or 0, 0])


def _candidates(plan: Schedule, samples: Samples) -> list[int]:
    """The places of the pack of most tokens and of the NEAR of most patches."""
    totals = _totals(plan, samples)
    return sorted({int(totals[:, 0].argmax()), *totals[:, 1].argsort()[-NEAR:].tolist()})
