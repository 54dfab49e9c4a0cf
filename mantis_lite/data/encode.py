"""A Sample -> its tensors, and its length without making them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from PIL.Image import Image as Picture
from tokenizers import Tokenizer

from ..errors import SampleError
from . import media
from .packing import Length
from .schema import Image, Sample
from .template import LabelRule, Piece, Template, Token, prompt, render
from .vision import Pixels, Runs, Size, Vision

IGNORE = -100
"""The label of a position without loss."""


@dataclass(frozen=True)
class Encoded:
    """One sample ready for a pack: input_ids (T,), labels (T,) with -100 off the loss, and its pictures' pixels.

    positions (R, T) where the family has more than one position a token; spans, the first token of each picture's and
    the one behind its last.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixels: Sequence[Pixels] = ()
    positions: np.ndarray | None = None
    spans: Sequence[tuple[int, int]] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Encoder:
    """Writes samples out in a template and tokenises them once: masks come from the same tokens as the ids.

    Special tokens enter as ids and the text between them is tokenised as plain text, so that text which looks like a
    special token stays text.
    """

    tokenizer: Tokenizer
    template: Template
    vision: Vision
    system: str | None = None
    labels: LabelRule = "answer"
    max_image_size: int | None = None

    def __post_init__(self) -> None:
        self.tokenizer.encode_special_tokens = True  # "<|eot_id|>" typed by a user is text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that a length depends on besides the sample."""
        facts = [self.tokenizer.to_str(), repr(self.template), self.system, self.labels, self.max_image_size]
        return hashlib.sha256(json.dumps([*facts, self.vision.facts]).encode()).hexdigest()[:16]

    @cached_property
    def reserved(self) -> list[str]:
        """Special tokens that this tokenizer cannot tell from text which looks like them, as a unigram model's."""
        vision, wrap = self.vision, self.vision.wrap
        around = {wrap.close, wrap.chunk, *(token for token, _ in vision.tokens((512, 512)))}
        marks = {str(mark) for mark in around if isinstance(mark, Token)} | self.template.tokens
        alike = [m for m in marks if self.token_id(m) in self.tokenizer.encode(m, add_special_tokens=False).ids]
        return sorted(alike) + list(self.template.marks)

    def measure(self, samples: Sequence[Sample]) -> list[Length | SampleError]:
        """Tokens and patches of each sample, from its text and its pictures' headers, or what is wrong with it."""
        with ThreadPoolExecutor(1) as pool:
            return self.begin_measure(samples, pool)()

    def begin_measure(self, samples: Sequence[Sample], pool: Executor) -> Callable[[], list[Length | SampleError]]:
        """As `measure`, tokenising in `pool` while the caller goes on; what is returned waits and answers."""
        rendered = [self._render_or_error(sample) for sample in samples]
        pieces = chain.from_iterable(pieces for pieces in rendered if not isinstance(pieces, SampleError))
        texts = list({p.content for p in pieces if type(p.content) is str})
        future = pool.submit(self.tokenizer.encode_batch_fast, texts, add_special_tokens=False)
        pictures = [self._picture_length(sample) for sample in samples]

        def finish() -> list[Length | SampleError]:
            tokens = {text: len(encoding) for text, encoding in zip(texts, future.result(), strict=True)}
            return [_length(*both, tokens) for both in zip(rendered, pictures, strict=True)]

        return finish

    def encode(self, sample: Sample) -> Encoded:
        """The sample's tensors; opens its pictures. Raises SampleError."""
        pictures = [media.open_image(image, sample, self.max_image_size) for image in sample.images]
        return self._encode(sample, self.render(sample), pictures)

    def encode_prompt(self, sample: Sample) -> Encoded:
        """The sample's turns and the header of the next answer, as `encode`, all without loss."""
        pictures = [media.open_image(image, sample, self.max_image_size) for image in sample.images]
        self._refuse_reserved(sample)
        return self._encode(sample, prompt(sample, self.template, self.system, self.vision.wrap), pictures)

    def render(self, sample: Sample) -> list[Piece]:
        """The sample written out in the template. Raises SampleError where its text would become a special token."""
        self._refuse_reserved(sample)
        return render(sample, self.template, self.system, self.labels, self.vision.wrap)

    def nothing(self) -> Encoded:
        """Two tokens without loss: what a pack holds that has lost all its samples."""
        token_id = self.token_id(self.template.end)
        return self._finish([token_id, token_id], [IGNORE, IGNORE], [], [])

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

    def _render_or_error(self, sample: Sample) -> list[Piece] | SampleError:
        try:
            return self.render(sample)
        except SampleError as error:
            return error

    def _picture_length(self, sample: Sample) -> Length | SampleError:
        tokens = patches = 0
        try:
            for image in sample.images:
                size = media.size(image, sample, self.max_image_size)
                tokens += len(self._picture_ids(sample, size))
                patches += self.vision.patches(size)
        except SampleError as error:
            return error
        return Length(tokens, patches)

    def _picture_ids(self, sample: Sample, size: Size) -> np.ndarray:
        try:
            return self.picture_ids(size)
        except ValueError as error:  # a shape that the family does not take
            found = f"a picture of {size[0]} x {size[1]} pixels: {error}"
            raise SampleError(sample.where, found, "Crop it, or drop the row.", sample.id) from None

    def _encode(self, sample: Sample, pieces: list[Piece], pictures: list[Picture]) -> Encoded:
        texts = [p.content for p in pieces if type(p.content) is str]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        shown = iter([self._picture_ids(sample, picture.size).tolist() for picture in pictures])
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
        return self._finish(ids, labels, [self.vision.pixels(picture) for picture in pictures], spans)

    def _finish(self, ids: list[int], labels: list[int], pixels: list[Pixels], spans: list[tuple[int, int]]) -> Encoded:
        labels[0] = IGNORE  # nothing predicts the first token, and in a pack the sample before must not
        input_ids = np.array(ids, dtype=np.int64)
        positions = None
        if self.vision.positions:
            positions = self.vision.positions(input_ids == self.token_id(self.vision.placeholder), pixels)
        return Encoded(input_ids, np.array(labels, dtype=np.int64), pixels, positions, spans)


def _length(
    pieces: list[Piece] | SampleError, pictures: Length | SampleError, tokens: dict[str, int]
) -> Length | SampleError:
    if isinstance(pieces, SampleError):
        return pieces
    if isinstance(pictures, SampleError):
        return pictures
    text = 0
    for content, _ in pieces:
        if type(content) is str:
            text += tokens[content]
        elif type(content) is Token:
            text += 1
    return Length(text + pictures.tokens, pictures.patches)
