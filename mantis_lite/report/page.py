"""A check as one HTML file: samples with their pictures and what of them trains, what was rejected, lengths, packs."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import cycle, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.encode import IGNORE
from ..data.packs import BLANK
from ..data.sample import Sample
from ..errors import SampleError
from ..memory.estimate import GIB
from ..memory.overrides import Work, peak
from ..memory.packs import Planned
from ..pages import thumbnail, write_html
from ..recipe import Recipe
from .check import Check, Outlook, render_tokens, target_of
from .fit import with_gpus

FIRST, LONGEST, RANDOM = 6, 6, 12
"""How many samples of each kind are shown."""
ROOM = 2_400_000
"""Bytes of each kind's text and of its pictures in base64: with all else, the page stays under 10 MB."""
MOST_PICTURES = 64
"""Pictures of a sample that are drawn; the others are there as their count of tokens."""
MOST_REJECTS, REJECTS_ROOM = 500, 1_000_000
MOST_PACKS, MOST_PARTS = 24, 200
MOST_BARS = 30
"""Labels that have a bar, those of most rows first."""
BINS = 12
HUES = 6
"""Colours that samples of a pack have in turn."""


class Bar(NamedTuple):
    """One line of a histogram; `share` is its length in % of the longest."""

    name: str
    rows: int
    share: float


class Piece(NamedTuple):
    """Text as the model gets it, or a picture by its data: URI, which None leaves undrawn."""

    text: str
    trained: bool
    is_picture: bool
    link: str | None = None


class Row(NamedTuple):
    """A sample as the page has it; `broken` says why it could not be had."""

    where: str
    pieces: list[Piece]
    tokens: int = 0
    trained: int = 0
    images: int = 0
    target: str | None = None
    broken: SampleError | None = None

    @property
    def size(self) -> int:
        return sum(_written(piece.text) + len(piece.link or "") for piece in self.pieces)


class Group(NamedTuple):
    """Samples of one kind, and how many of them the page has no room for."""

    title: str
    rows: list[Row]
    left: int


class PackBar(NamedTuple):
    """A pack's tokens and its samples, each by its hue (None is a blank picture), its width in % and its name."""

    tokens: int
    fill: float
    parts: list[tuple[int | None, float, str]]
    left: int


class Memory(NamedTuple):
    """GiB of a GPU at the peak of a step by what they are for, or why there is no estimate."""

    terms: dict[str, float]
    total: float
    why_not: str | None = None


def write_check_page(found: Check, recipe: Recipe, file: Path) -> None:
    """Write the page: no request leaves it, and what rows say cannot become part of it. Raises OSError, SampleError.

    However many rows there are, some are shown, and the others counted.
    """
    outlook, rejects = found.outlook, _rejects(found)
    write_html(
        "report/check.html",
        file,
        found=found,
        recipe=recipe,
        rejects=rejects,
        left=len(found.prepared.rejects) - len(rejects),
        groups=_groups(found, recipe.packing.seed) if outlook else [],
        histograms=_histograms(found, outlook) if outlook else [],
        packs=_packs(found, outlook) if outlook else [],
        hues=HUES,
        memory=_memory(found, outlook, recipe) if outlook else None,
    )


def _rejects(found: Check) -> list[SampleError]:
    """As many as there is room for."""
    shown, room = [], REJECTS_ROOM
    for reject in found.prepared.rejects[:MOST_REJECTS]:
        room -= _written(str(reject))
        if room < 0:
            break
        shown.append(reject)
    return shown


def _written(text: str) -> int:
    """Bytes that a text takes in the page."""
    return len(escape(text).encode(errors="backslashreplace"))


def _groups(found: Check, seed: int) -> list[Group]:
    """The first samples, the longest, and some of the others by chance; none of them twice."""
    lengths = found.prepared.train.lengths[:, 0]
    first = np.arange(min(FIRST, len(lengths)))
    longest = np.setdiff1d(np.argsort(-lengths, kind="stable")[: FIRST + LONGEST], first)
    longest = longest[np.argsort(-lengths[longest], kind="stable")][:LONGEST]
    others = np.setdiff1d(np.arange(len(lengths)), [*first, *longest])
    drawn = np.random.default_rng(seed).permutation(others)[:RANDOM]
    kinds = (("The first", first), ("The longest of the others", longest), ("Some of the others", np.sort(drawn)))
    return [_group(found, title, places.tolist()) for title, places in kinds if len(places)]


def _group(found: Check, title: str, places: list[int]) -> Group:
    shown, room = [], ROOM
    for at in places:
        row = _row(found, at)
        if row.size <= room:
            room -= row.size
            shown.append(row)
    return Group(title, shown, len(places) - len(shown))


def _row(found: Check, at: int) -> Row:
    """A sample as the model gets it; where only headers were read, its pictures may yet turn out to be broken."""
    encoder, name = found.encoder, found.prepared.train.called(at)
    sample = found.prepared.train[at]
    try:
        encoded = encoder.encode(sample)
        links = _links(found, sample)
    except SampleError as error:
        return Row(name, [], broken=error)
    stretches = render_tokens(encoder, encoded)
    pieces = [Piece(s.text, s.trained, s.is_picture, next(links, None) if s.is_picture else None) for s in stretches]
    trained = int((encoded.labels != IGNORE).sum())
    return Row(name, pieces, len(encoded), trained, len(encoded.spans), target_of(found.prepared, at))


def _links(found: Check, sample: Sample) -> Iterator[str]:
    """The first pictures and frames of a sample, small."""
    frames = found.encoder.frames
    laid_out = frames.lay_out(sample)
    opened = frames.open(laid_out, found.encoder.max_image_size, laid_out.images[:MOST_PICTURES])
    return map(thumbnail, opened)


def _histograms(found: Check, outlook: Outlook) -> list[tuple[str, list[Bar]]]:
    """Titles and bars: tokens and pictures of samples, how full packs are, and labels."""
    samples, labels = found.prepared.train, found.prepared.labels
    tokens = outlook.schedule.packs[: outlook.packs].sums(samples.lengths, [outlook.schedule.touch or 0, 0])[:, 0]
    full = 100 * tokens // outlook.budget
    made = [
        ("Tokens of a sample", histogram(samples.lengths[:, 0])),
        ("Pictures of a sample", histogram(samples.images)),
        ("How full a pack is, %", histogram(full)),
    ]
    if labels is None or samples.targets is None:
        return made
    if labels.problem == "regression":
        columns = zip(labels.names[:MOST_BARS], samples.targets.T, strict=False)  # of more labels no chart is of use
        return made + [(f"Scores to be given: {name}", histogram(column)) for name, column in columns]
    if labels.problem == "single_label":
        counts = np.bincount(samples.targets, minlength=len(labels.names))
    else:
        counts = (samples.targets > 0).sum(0)
    order = np.argsort(-counts, kind="stable")[:MOST_BARS]
    bars = _bars([labels.names[at] for at in order], counts[order])
    left = len(labels.names) - len(bars)
    return [*made, ("Rows of a label" + (f"; {left:,} labels of fewer rows are left out" if left else ""), bars)]


def histogram(values: np.ndarray) -> list[Bar]:
    """A bar for each whole number, or for each of BINS equal ranges where there are more or values are in between."""
    low, high = values.min(), values.max()
    whole = np.issubdtype(values.dtype, np.integer)
    if low == high or (whole and high - low < BINS):
        names = [f"{(low + at).item():{',' if whole else 'g'}}" for at in range(int(high - low) + 1)]
        return _bars(names, np.bincount((values - low).astype(np.int64)))
    if whole:
        width = -(-(int(high) - int(low) + 1) // BINS)
        edges = np.arange(int(low), int(high) + 1, width)
        counts = np.bincount((values - low) // width, minlength=len(edges))
        lasts = np.minimum(edges + width - 1, int(high))
        return _bars([_range(*ends) for ends in zip(edges.tolist(), lasts.tolist(), strict=True)], counts)
    counts, between = np.histogram(values, BINS)
    return _bars([f"{a:.3g} to {b:.3g}" for a, b in pairwise(between)], counts)


def _range(first: int, last: int) -> str:
    return f"{first:,} to {last:,}" if first < last else f"{first:,}"


def _bars(names: list[str], counts: np.ndarray) -> list[Bar]:
    most = max(1, int(counts.max()))
    return [Bar(name, count, 100 * count / most) for name, count in zip(names, counts.tolist(), strict=True)]


def _packs(found: Check, outlook: Outlook) -> list[PackBar]:
    """The first packs of the run."""
    samples, made = found.prepared.train, []
    hues = cycle(range(HUES))
    for pack in outlook.schedule.packs[: min(MOST_PACKS, outlook.packs)]:
        tokens = [outlook.schedule.touch or 0 if at == BLANK else int(samples.lengths[at, 0]) for at in pack]
        parts: list[tuple[int | None, float, str]] = []
        for at, count in list(zip(pack, tokens, strict=True))[:MOST_PARTS]:
            what = "a blank picture" if at == BLANK else samples.called(at)
            hue = None if at == BLANK else next(hues)
            parts.append((hue, 100 * count / outlook.budget, f"{what}: {count:,} tokens"))
        made.append(PackBar(sum(tokens), sum(tokens) / outlook.budget, parts, len(pack) - len(parts)))
    return made


def _memory(found: Check, outlook: Outlook, recipe: Recipe) -> Memory:
    """What `fit` says of the largest pack, as far as it can be said without a card."""
    if recipe.memory.fit == "auto":
        return Memory({}, 0, "memory.fit=auto picks for a card: see `mantis-lite fit --gpu 24`")
    recipe, _ = with_gpus(recipe, None)
    checkpoint, prepared = found.checkpoint, found.prepared
    rows = Planned(recipe, checkpoint, found.encoder, prepared.train, outlook.schedule, prepared.held_out)
    estimate = peak(Work(checkpoint.config, checkpoint.family, checkpoint.image_processor, rows), recipe)
    if isinstance(estimate, str):
        return Memory({}, 0, estimate)
    terms = {what: size / GIB for what, size in {**estimate.terms, **estimate.overhead}.items()}
    return Memory(terms, estimate.total / GIB)
