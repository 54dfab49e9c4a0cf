"""What a recipe would train on, found without a GPU and without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..data.encode import IGNORE, Encoded, Encoder
from ..data.packing import fill
from ..data.prepare import Prepared, prepare
from ..data.sample import Frame, Image, Sample
from ..data.schedule import Schedule, schedule
from ..errors import RecipeError, SampleError
from ..models.assemble import open_model
from ..models.cacheable import feature_bytes, shown, trained_parts
from ..models.checkpoint import Checkpoint
from ..models.head_config import stated_head
from ..recipe import Recipe
from .decoding import Watch, sound
from .said import Stretch


class Spread(NamedTuple):
    """The least, middle and greatest of a count over samples."""

    least: int
    median: int
    most: int


class Kept(NamedTuple):
    """What memory.vision_cache would hold: different pictures, their features' bytes, and uses of a picture."""

    pictures: int
    size: int
    uses: float


@dataclass(frozen=True)
class Check:
    """What was read, with all that is wrong in `prepared.rejects`; and what of it would train, where anything would."""

    prepared: Prepared
    notice: str | None
    outlook: Outlook | None
    checkpoint: Checkpoint
    encoder: Encoder
    files: set[str | None] | None
    """Those of all pictures and clips, None standing for what is in no file; None where they were not decoded."""


@dataclass(frozen=True)
class Outlook:
    """Lengths, packs and steps of the rows that are sound, and one of them as the model gets it."""

    schedule: Schedule
    template: str
    tokens: Spread
    images: Spread
    packs: int
    budget: int
    """Tokens of a full pack; without packing, those of the longest sample."""
    fill: float
    steps_per_epoch: int
    sample: Sample
    rendered: list[Stretch]
    trained_tokens: int
    target: str | None
    """What the sample's scores are to be, where they are what trains."""
    kept: Kept | None
    """Where a vision cache would pay: the tower is frozen, and pictures come back in later epochs."""


def check(recipe: Recipe, decode: bool = True, watch: Watch = lambda found, total: found) -> Check:
    """Read, measure and pack a recipe's data, and `decode` each row's pictures and clips as a step would.

    It does not stop at what is wrong with a row or a source, but lists it. Raises RecipeError, and DataError where no
    epoch has a row.
    """
    checkpoint = open_model(recipe.model)
    encoder = checkpoint.encoder(recipe)
    head = stated_head(checkpoint, recipe)
    prepared = prepare(recipe.data, recipe.packing, encoder, task=recipe.task, head=head, every_fault=True)
    files: set[str | None] | None = set() if decode else None
    if files is not None:
        prepared.train = sound(prepared.train, encoder, prepared.rejects, files, watch)
        if prepared.held_out is not None:
            prepared.held_out = sound(prepared.held_out, encoder, prepared.rejects, files, watch)
    outlook = _outlook(recipe, checkpoint, encoder, prepared) if len(prepared.train) else None
    return Check(prepared, checkpoint.notice, outlook, checkpoint, encoder, files)


def _outlook(recipe: Recipe, checkpoint: Checkpoint, encoder: Encoder, prepared: Prepared) -> Outlook | None:
    """None where no sample is left to show."""
    samples = prepared.train
    first_sound = next(_encoded(prepared, encoder), None)
    if first_sound is None:
        return None
    at, sample, encoded = first_sound
    packs = schedule(samples, recipe.packing, recipe.train)
    first = packs.packs[: packs.epoch_sizes[0]]
    longest = recipe.packing.max_length if recipe.packing.enabled else int(samples.lengths[:, 0].max())
    return Outlook(
        schedule=packs,
        template=encoder.template.name,
        tokens=_spread(samples.lengths[:, 0]),
        images=_spread(samples.images),
        packs=packs.epoch_sizes[0],
        budget=longest,
        fill=fill(samples.lengths[first.samples], len(first), longest),
        steps_per_epoch=-(-packs.epoch_sizes[0] // packs.per_step),
        sample=sample,
        rendered=render_tokens(encoder, encoded),
        trained_tokens=int((encoded.labels != IGNORE).sum()),
        target=target_of(prepared, at),
        kept=_kept(recipe, checkpoint, encoder, prepared, packs),
    )


def _encoded(prepared: Prepared, encoder: Encoder) -> Iterator[tuple[int, Sample, Encoded]]:
    """Samples with their place and what becomes of them, past those that cannot be decoded, if nothing was before."""
    for at, sample in enumerate(prepared.train):
        try:
            yield at, sample, encoder.encode(sample)
        except SampleError as error:
            prepared.rejects.append(error)


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
        stretches.append(Stretch(text, bool(kinds[start] == 1), bool(kinds[start] > 1)))
    return stretches


def _kept(recipe: Recipe, checkpoint: Checkpoint, encoder: Encoder, prepared: Prepared, packs: Schedule) -> Kept | None:
    """Pictures are told apart by their files' names here: reading all of them is left to the run."""
    if len(packs.epoch_sizes) < 2 or not prepared.train.images.any():
        return None
    try:
        bytes_of = feature_bytes(checkpoint, recipe, encoder.vision, trained_parts(recipe))
    except RecipeError:
        return None  # nothing can be kept of such a model
    broken: list[SampleError] = []
    drawn = np.unique(packs.packs.samples).tolist()
    pictures = shown([(prepared.train, drawn)], encoder, _name, broken.append)
    uses = int(prepared.train.images[packs.packs.samples].sum())
    return Kept(
        pictures=len(pictures),
        size=sum(bytes_of(place.size) for place in pictures.values()),
        uses=uses / max(1, len(pictures)),
    )


def _name(image: Image) -> tuple[str, float | None]:
    source = sha256(image.source).hexdigest() if isinstance(image.source, bytes) else str(image.source)
    return source, image.at if isinstance(image, Frame) else None


def target_of(prepared: Prepared, at: int) -> str | None:
    """A sample's target, by the labels' names, where its scores are what trains."""
    labels, targets = prepared.labels, prepared.train.targets
    if labels is None or targets is None:
        return None
    if labels.problem == "single_label":
        return labels.names[targets[at]]
    return ", ".join(f"{name} {value:g}" for name, value in zip(labels.names, targets[at], strict=True))


def _spread(counts: np.ndarray) -> Spread:
    return Spread(int(counts.min()), int(np.median(counts)), int(counts.max()))
