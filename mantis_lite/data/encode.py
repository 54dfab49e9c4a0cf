"""A Sample -> its tensors, and its length without making them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL.Image import Image as Picture
from tokenizers import Tokenizer

from ..errors import SampleError
from . import media
from .packing import Length
from .schema import Image, Sample
from .template import LabelRule, Piece, Template, Token, Wrap, prompt, render

IGNORE = -100
"""The label of a position without loss."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Vision:
    """What a family's pictures come to: text around the j-th, tokens and patches by (width, height), and pixels.

    `pixels` turns pictures into the model's own inputs, arrays by name with one row a picture.
    """

    token: Token
    wrap: Wrap
    tokens: Callable[[Size], int]
    patches: Callable[[Size], int]
    pixels: Callable[[list[Picture]], dict[str, np.ndarray]]
    facts: str
    """Names everything `tokens`, `patches` and `wrap` depend on, for the cache of lengths."""


@dataclass(frozen=True)
class Encoded:
    """One sample ready for a pack: input_ids (T,), labels (T,) with -100 off the loss, pixels (N, ...) by name."""

    input_ids: np.ndarray
    labels: np.ndarray
    pixels: dict[str, np.ndarray]

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

    def measure(self, samples: Sequence[Sample]) -> list[Length | SampleError]:
        """Tokens and patches of each sample, from its text and its pictures' headers, or what is wrong with it."""
        with ThreadPoolExecutor(1) as pool:
            return self.begin_measure(samples, pool)()

    def begin_measure(self, samples: Sequence[Sample], pool: Executor) -> Callable[[], list[Length | SampleError]]:
        """As `measure`, tokenising in `pool` while the caller goes on; what is returned waits and answers."""
        rendered = [self.render(sample) for sample in samples]
        texts = list({p.content for pieces in rendered for p in pieces if type(p.content) is str})
        future = pool.submit(self.tokenizer.encode_batch_fast, texts, add_special_tokens=False)
        pictures = [self._picture_length(sample) for sample in samples]

        def finish() -> list[Length | SampleError]:
            tokens = {text: len(encoding) for text, encoding in zip(texts, future.result(), strict=True)}
            return [_length(*both, tokens) for both in zip(rendered, pictures, strict=True)]

        return finish

    def encode(self, sample: Sample) -> Encoded:
        """The sample's tensors; opens its pictures. Raises SampleError."""
        pictures = [media.open_image(image, sample, self.max_image_size) for image in sample.images]
        return self._encode(self.render(sample), pictures)

    def encode_prompt(self, sample: Sample) -> Encoded:
        """The sample's turns and the header of the next answer, as `encode`, all without loss."""
        pictures = [media.open_image(image, sample, self.max_image_size) for image in sample.images]
        return self._encode(prompt(sample, self.template, self.system, self.vision.wrap), pictures)

    def render(self, sample: Sample) -> list[Piece]:
        return render(sample, self.template, self.system, self.labels, self.vision.wrap)

    def token_id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        assert token_id is not None, token
        return token_id

    def _picture_length(self, sample: Sample) -> Length | SampleError:
        tokens = patches = 0
        try:
            for image in sample.images:
                size = media.size(image, sample, self.max_image_size)
                tokens += self.vision.tokens(size)
                patches += self.vision.patches(size)
        except SampleError as error:
            return error
        return Length(tokens, patches)

    def _encode(self, pieces: list[Piece], pictures: list[Picture]) -> Encoded:
        texts = [p.content for p in pieces if type(p.content) is str]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        sizes = iter([picture.size for picture in pictures])
        ids: list[int] = []
        labels: list[int] = []
        for content, loss_from in pieces:
            if isinstance(content, Image):
                count = self.vision.tokens(next(sizes))
                ids += [self.token_id(self.vision.token)] * count
                labels += [IGNORE] * count
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
        pixels = self.vision.pixels(pictures) if pictures else {}
        return Encoded(np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64), pixels)


def _length(pieces: list[Piece], pictures: Length | SampleError, tokens: dict[str, int]) -> Length | SampleError:
    if isinstance(pictures, SampleError):
        return pictures
    text = 0
    for content, _ in pieces:
        if type(content) is str:
            text += tokens[content]
        elif type(content) is Token:
            text += 1
    return Length(text + pictures.tokens, pictures.patches)
