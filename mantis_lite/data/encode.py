"""A Sample -> its tensors, and its length without making them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import numpy as np
import PIL.Image
from numpy.typing import ArrayLike
from PIL.Image import Image as Picture
from tokenizers import Tokenizer

from ..errors import SampleError
from . import media
from .features import SIZE, Features
from .frames import Frames
from .lengths import Measured
from .sample import Image, Sample, Turn, Written
from .template import LabelRule, Piece, Template, Token, plain, prompt, render
from .vision import Pixels, Runs, Size, Vision

IGNORE = -100
"""The label of a position without loss."""

BLANKS: tuple[Size, ...] = ((28, 28), (280, 28))
"""Shapes of a blank picture: the one of fewer patches is taken, as a narrow one may have fewer tiles."""

TEXTS = 128
"""Texts tokenised at once: of more, memory has to be found for what is found, which takes longer."""

GREY = (64, 64, 64)
"""The colour of a blank picture. Middle grey could become 0, which Idefics' models take for padding."""


@dataclass(frozen=True)
class Encoded:
    """One sample ready for a pack: input_ids (T,), labels (T,) with -100 off the loss, and its pictures' pixels.

    positions (R, T) where the family has more than one position a token; spans, the first token of each picture's and
    the one behind its last; target, what a score head is to say of it: (L,) numbers, or () the number of a class.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixels: Sequence[Pixels] = ()
    positions: np.ndarray | None = None
    spans: Sequence[tuple[int, int]] = ()
    target: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Score:
    """What stands in a prompt for a score head: nothing, or one token for each label, named in an answer of its own.

    `names` are the labels', in order; they are told to the model only where there are tokens.
    """

    names: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The original's names for them, counted from 1."""
        return tuple(Token(f"<|LABEL_{at}|>") for at in range(1, len(self.names) + 1))

    def answered(self, sample: Sample) -> Sample:
        """The sample with the turn that holds the labels' tokens."""
        parts: list[str] = []
        for name, token in zip(self.names, self.tokens, strict=True):
            parts += [f"The score for {name} is ", token, ". "]
        return replace(sample, turns=(*sample.turns, Turn("assistant", tuple(parts))))


@dataclass(frozen=True)
class Encoder:
    """Writes samples out in a template and tokenises them once: masks come from the same tokens as the ids.

    Special tokens enter as ids and the text between them is tokenised as plain text, so that text which looks like a
    special token stays text. With `score` a sample is a prompt to be scored, written without turns unless the labels
    have tokens. With `features` a picture is what is kept of it there, and its pixels are not opened.
    """

    tokenizer: Tokenizer
    template: Template
    vision: Vision
    system: str | None = None
    labels: LabelRule = "answer"
    max_image_size: int | None = None
    frames: Frames = field(default_factory=Frames)
    score: Score | None = None
    features: Features | None = None

    def __post_init__(self) -> None:
        self.tokenizer.encode_special_tokens = True  # "<|eot_id|>" typed by a user is text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    @property
    def facts(self) -> dict[str, str | int | None]:
        """All that a sample's ids, labels and length depend on besides the sample, by where it is set."""
        return {
            "model's tokenizer": self.tokenizer.to_str(),
            "prompt.template": repr(self.template),
            "prompt.system": self.system,
            "prompt.labels": self.labels,
            "media.max_image_size": self.max_image_size,
            "model's pictures": self.vision.facts,
            "media": self.frames.facts,
            "head": repr(self.score),
        }

    @cached_property
    def fingerprint(self) -> str:
        """A hash of `facts`."""
        return hashlib.sha256(json.dumps([*self.facts.values()]).encode()).hexdigest()[:16]

    @cached_property
    def reserved(self) -> list[str]:
        """Special tokens that this tokenizer cannot tell from text which looks like them, as a unigram model's."""
        vision, wrap = self.vision, self.vision.wrap
        around = {wrap.close, wrap.chunk, *(token for token, _ in vision.tokens((4096, 4096)))}
        marks = {str(mark) for mark in around if isinstance(mark, Token)} | self.template.tokens
        marks |= set(self.score.tokens) if self.score else set()
        marks |= {added.content for added in self.tokenizer.get_added_tokens_decoder().values() if added.special}
        alike = [m for m in marks if self.token_id(m) in self.tokenizer.encode(m, add_special_tokens=False).ids]
        return sorted(alike) + list(self.template.marks)

    def measure(self, samples: Sequence[Sample]) -> list[Measured | SampleError]:
        """Tokens, patches and pictures of each sample, from its text and its media's headers, or what is wrong."""
        with ThreadPoolExecutor(1) as pool:
            return self.begin_measure(samples, pool)()

    def begin_measure(self, samples: Sequence[Sample], pool: Executor) -> Callable[[], list[Measured | SampleError]]:
        """As `measure`, tokenising in `pool` while the caller goes on; what is returned waits and answers."""
        written = [self._written(sample) for sample in samples]
        pieces = chain.from_iterable(found[1] for found in written if not isinstance(found, SampleError))
        texts = list({p.content for p in pieces if type(p.content) is str})
        future = pool.submit(self._counts, texts)
        pictures = [found if isinstance(found, SampleError) else self._pictures_length(found[0]) for found in written]

        def finish() -> list[Measured | SampleError]:
            tokens = dict(zip(texts, future.result(), strict=True))
            return [_measured(*both, tokens) for both in zip(written, pictures, strict=True)]

        return finish

    def _counts(self, texts: list[str]) -> list[int]:
        batches = (texts[at : at + TEXTS] for at in range(0, len(texts), TEXTS))
        found = (self.tokenizer.encode_batch_fast(batch, add_special_tokens=False) for batch in batches)
        return [*map(len, chain.from_iterable(found))]

    def encode(self, sample: Sample) -> Encoded:
        """The sample's tensors; opens its pictures and clips. Raises SampleError."""
        if sample.written is not None:
            return self._as_written(sample, sample.written)
        sample = self.frames.lay_out(sample)
        return self._encode(sample, self._render(sample))

    def write(self, sample: Sample) -> tuple[Sample, list[Picture], Written]:
        """What is kept of a sample in a shard: it laid out, its pictures' pixels, and its ids and labels.

        `encode` then makes of these what it makes of the sample. Raises SampleError.
        """
        sample = self.frames.lay_out(sample)
        pictures = self.frames.open(sample, self.max_image_size)
        tokens = self._tokens(sample, self._render(sample), [picture.size for picture in pictures])
        ids, labels, spans = (np.array(part, dtype=np.int32) for part in tokens)
        return sample, pictures, Written(ids, labels, spans.reshape(-1, 2), self.fingerprint)

    def encode_prompt(self, sample: Sample) -> Encoded:
        """The sample's turns and the header of the next answer, as `encode`, all without loss."""
        sample = self.frames.lay_out(sample)
        self._refuse_reserved(sample)
        return self._encode(sample, prompt(sample, self.template, self.system, self.vision.wrap))

    def render(self, sample: Sample) -> list[Piece]:
        """The sample written out in the template. Raises SampleError where its text would become a special token."""
        return self._render(self.frames.lay_out(sample))

    def _render(self, sample: Sample) -> list[Piece]:
        self._refuse_reserved(sample)
        if self.score is not None and not self.score.names:
            return plain(sample, self.template, self.vision.wrap)
        answered = sample if self.score is None else self.score.answered(sample)
        return render(answered, self.template, self.system, self.labels, self.vision.wrap)

    def supervised(self, sample: Sample) -> int:
        """How many positions of a sample have loss; opens no picture beyond its header. Raises SampleError."""
        sample = self.frames.lay_out(sample)
        sizes = [media.size(image, sample, self.max_image_size) for image in sample.images]
        _, labels, _ = self._tokens(sample, self._render(sample), sizes)
        return sum(label != IGNORE for label in labels)

    def nothing(self) -> Encoded:
        """The least there can be, without loss: what a pack holds that has lost all its samples."""
        tokens = (self.template.end, *((self.score and self.score.tokens) or (self.template.end,)))
        return self._finish([self.token_id(token) for token in tokens], [IGNORE] * len(tokens), [], [])

    def blank(self) -> Encoded:
        """A plain picture without loss: the vision tower has something to do in a pack without pictures, too."""
        assert self.features is None, "kept features have none of a blank picture"
        ids = self.picture_ids(self.blank_size).tolist()
        scored = [self.token_id(token) for token in (self.score.tokens if self.score else ())]
        pixels = self.vision.pixels(PIL.Image.new("RGB", self.blank_size, GREY))
        return self._finish([*ids, *scored], [IGNORE] * (len(ids) + len(scored)), [(0, len(ids))], [pixels])

    def blank_length(self) -> Measured:
        """The length of `blank`."""
        scored = len(self.score.tokens) if self.score else 0
        tokens = len(self.picture_ids(self.blank_size)) + scored
        return Measured(tokens, self.vision.patches(self.blank_size), 1)

    @property
    def blank_size(self) -> Size:
        """The (width, height) of a blank picture."""
        return min(BLANKS, key=self.vision.patches)

    def token_id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        assert token_id is not None, token
        return token_id

    @cached_property
    def _pictures(self) -> dict[Runs, np.ndarray]:
        return {}

    def picture_ids(self, size: Size) -> np.ndarray:
        """The ids that stand for a picture of this size."""
        runs = self.vision.tokens(size)
        found = self._pictures.get(runs)
        if found is None:
            parts = [np.tile(self._run_ids(part), count) for part, count in runs]
            found = self._pictures[runs] = np.concatenate(parts)
        return found

    def _run_ids(self, part: str) -> list[int]:
        if isinstance(part, Token):
            return [self.token_id(part)]
        return self.tokenizer.encode(part, add_special_tokens=False).ids

    def _refuse_reserved(self, sample: Sample) -> None:
        for mark in self.reserved:
            if any(isinstance(part, str) and mark in part for turn in sample.turns for part in turn.content):
                found = f"a turn has the text {mark!r}, which this tokenizer takes for a special token"
                raise SampleError(sample.where, found, "Write it with a blank in it, or drop the row.", sample.id)

    def _written(self, sample: Sample) -> tuple[Sample, list[Piece]] | SampleError:
        try:
            sample = self.frames.lay_out(sample)
            return sample, self._render(sample)
        except SampleError as error:
            return error

    def _pictures_length(self, sample: Sample) -> Measured | SampleError:
        tokens = patches = cut = 0
        images = sample.images
        try:
            for image in images:
                size, more = media.header(image, sample, self.max_image_size)
                tokens += len(self._picture_ids(sample, size))
                patches += self.vision.patches(size)
                cut += more
        except SampleError as error:
            return error
        return Measured(tokens, patches, len(images), cut)

    def _picture_ids(self, sample: Sample, size: Size) -> np.ndarray:
        try:
            return self.picture_ids(size)
        except ValueError as error:  # a shape that the family does not take
            found = f"a picture of {size[0]} x {size[1]} pixels: {error}"
            raise SampleError(sample.where, found, "Crop it, or drop the row.", sample.id) from None

    def _encode(self, sample: Sample, pieces: list[Piece]) -> Encoded:
        sizes, pixels = self._seen(sample)
        written = self._tokens(sample, pieces, sizes)
        return self._finish(*written, pixels())

    def _as_written(self, sample: Sample, written: Written) -> Encoded:
        assert written.by == self.fingerprint, "a sample written out by another encoder"
        _, pixels = self._seen(sample)
        spans = [(first, behind) for first, behind in written.spans.tolist()]
        return self._finish(written.ids, written.labels, spans, pixels())

    def _tokens(
        self, sample: Sample, pieces: list[Piece], sizes: Sequence[Size]
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Ids, labels and where pictures stand, of pieces whose pictures have these sizes."""
        texts = [p.content for p in pieces if type(p.content) is str]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        shown = iter([self._picture_ids(sample, size).tolist() for size in sizes])
        spans: list[tuple[int, int]] = []
        ids: list[int] = []
        labels: list[int] = []
        for content, loss_from in pieces:
            if isinstance(content, Image):
                picture = next(shown)
                spans.append((len(ids), len(ids) + len(picture)))
                ids += picture
                labels += [IGNORE] * len(picture)
            elif isinstance(content, Token):
                ids.append(self.token_id(content))
                labels.append(ids[-1] if loss_from == 0 else IGNORE)
            else:
                encoding = next(encodings)
                ids += encoding.ids
                # A token that straddles the boundary carries the first letters of the answer, so it is trained.
                ends = (end for _, end in encoding.offsets)
                labels += [i if end > loss_from else IGNORE for i, end in zip(encoding.ids, ends, strict=True)]
        labels[0] = IGNORE  # nothing predicts the first token, and in a pack the sample before must not
        return ids, labels, spans

    def _seen(self, sample: Sample) -> tuple[list[Size], Callable[[], list[Pixels]]]:
        """The sizes of a sample's pictures; and what the model takes of each, once it is known to take such sizes."""
        if self.features is None:
            pictures = self.frames.see(sample, self.max_image_size, self.vision.enough)
            return [picture.size for picture in pictures], lambda: [self.vision.pixels(p) for p in pictures]
        kept = []
        for image in sample.images:
            found = self.features.find(image)
            if found is None:
                self.frames.open(sample, self.max_image_size, [image])  # says what is wrong with one that breaks
                what = "a picture, or what memory.vision_cache keeps of it, is not as it was when the run started"
                raise SampleError(sample.where, what, "Start the run again: it goes on where it was.", sample.id)
            kept.append(found)
        return [tuple(features[SIZE].tolist()) for features in kept], lambda: kept

    def _finish(self, ids: ArrayLike, labels: ArrayLike, spans: list[tuple[int, int]], pixels: list[Pixels]) -> Encoded:
        input_ids = np.array(ids, dtype=np.int64)
        positions = None
        if self.vision.positions:
            positions = self.vision.positions(input_ids == self.token_id(self.vision.placeholder), pixels)
        return Encoded(input_ids, np.array(labels, dtype=np.int64), pixels, positions, spans)


def _measured(
    written: tuple[Sample, list[Piece]] | SampleError, pictures: Measured | SampleError, tokens: dict[str, int]
) -> Measured | SampleError:
    if isinstance(written, SampleError):
        return written
    if isinstance(pictures, SampleError):
        return pictures
    found = pictures.tokens
    for content, _ in written[1]:
        if type(content) is str:
            found += tokens[content]
        elif type(content) is Token:
            found += 1
    return Measured(found, *pictures[1:])
