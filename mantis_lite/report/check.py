"""What a recipe would train on, found without a GPU and without weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..data.dataset import Schedule, schedule
from ..data.encode import IGNORE, Encoded, Encoder
from ..data.packing import fill
from ..data.prepare import Prepared, prepare
from ..data.sample import Sample
from ..models.checkpoint import open_checkpoint
from ..models.load import stated_head
from ..recipe import Recipe


class Spread(NamedTuple):
    """The least, middle and greatest of a count over samples."""

    least: int
    median: int
    most: int


class Stretch(NamedTuple):
    """A run of a prompt's tokens, as text; `pictures` placeholders are shown as one mark."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Check:
    """Rows read and rejected, lengths, packs and steps, and one sample as the model gets it."""

    prepared: Prepared
    notice: str | None
    schedule: Schedule
    template: str
    tokens: Spread
    images: Spread
    packs: int
    fill: float
    steps_per_epoch: int
    sample: Sample
    rendered: list[Stretch]
    trained_tokens: int
    target: str | None
    """What the sample's scores are to be, where they are what trains."""


def check(recipe: Recipe) -> Check:
    """Read, measure and pack a recipe's data. Raises RecipeError, DataError, SampleError and FitError."""
    checkpoint = open_checkpoint(recipe.model)
    encoder = checkpoint.encoder(recipe)
    prepared = prepare(recipe.data, recipe.packing, encoder, task=recipe.task, head=stated_head(checkpoint, recipe))
    packs = schedule(prepared.train, recipe.packing, recipe.train)
    samples = prepared.train
    sample = samples[0]
    encoded = encoder.encode(sample)
    first = packs.packs[: packs.epoch_sizes[0]]
    longest = recipe.packing.max_length if recipe.packing.enabled else int(samples.lengths[:, 0].max())
    return Check(
        prepared=prepared,
        notice=checkpoint.notice,
        schedule=packs,
        template=encoder.template.name,
        tokens=_spread(samples.lengths[:, 0]),
        images=_spread(samples.images),
        packs=packs.epoch_sizes[0],
        fill=fill(samples.lengths[[i for pack in first for i in pack]], len(first), longest),
        steps_per_epoch=-(-packs.epoch_sizes[0] // packs.accumulation),
        sample=sample,
        rendered=render_tokens(encoder, encoded),
        trained_tokens=int((encoded.labels != IGNORE).sum()),
        target=_target(prepared),
    )


def render_tokens(encoder: Encoder, encoded: Encoded) -> list[Stretch]:
    """A sample's tokens back as text, cut where loss begins and ends; a picture's placeholders become one mark."""
    kinds = (encoded.labels != IGNORE).astype(int)
    for number, (start, end) in enumerate(encoded.spans, 2):
        kinds[start:end] = number  # each picture its own, so that neighbours stay apart
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    stretches = []
    for start, end in pairwise(cuts):
        if kinds[start] > 1:
            text = f"[picture: {end - start} tokens]"
        else:
            text = encoder.tokenizer.decode(encoded.input_ids[start:end].tolist(), skip_special_tokens=False)
        stretches.append(Stretch(text, bool(kinds[start] == 1)))
    return stretches


def _target(prepared: Prepared) -> str | None:
    """The first sample's target, by the labels' names."""
    labels, targets = prepared.labels, prepared.train.targets
    if labels is None or targets is None:
        return None
    if labels.problem == "single_label":
        return labels.names[targets[0]]
    return ", ".join(f"{name} {value:g}" for name, value in zip(labels.names, targets[0], strict=True))


def _spread(counts: np.ndarray) -> Spread:
    return Spread(int(counts.min()), int(np.median(counts)), int(counts.max()))
