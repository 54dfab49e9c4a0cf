"""What a family's pictures come to: tokens, patches, pixels, and the model's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL.Image import Image as Picture

from .template import Token, Wrap

if TYPE_CHECKING:
    from .turbo import Turbo

Size = tuple[int, int]
"""(width, height) in pixels."""

Seen: TypeAlias = "Picture | Turbo"
"""A decoded picture, by either media.backend."""

Pixels = dict[str, Any]
"""One picture as the model takes it: bytes, in arrays by name; or its features, where they are kept (`features.py`)."""

Runs = tuple[tuple[str, int], ...]
"""What stands for a picture in a prompt: a `Token` or text, and how many times it is repeated."""


def bounded(size: Size, longest: int, shortest: int) -> Size:
    """A size as Idefics' processors bound it: the longest side first, then each side brought up to the shortest."""
    width, height = size
    ratio = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / ratio)
    elif height > width and height > longest:
        width, height = int(longest * ratio), longest
    return max(width, shortest), max(height, shortest)


def planes(picture: Seen) -> np.ndarray:
    """A picture's bytes (3, H, W), a view of what it holds."""
    return np.asarray(picture).transpose(2, 0, 1)


def all_of_it(size: Size) -> Size:
    """As many pixels as a picture has."""
    return size


def lay_end_to_end(pictures: Sequence[Pixels]) -> dict[str, Any]:
    """The arrays of all pictures by name, one after the other along their first axis."""
    names = pictures[0] if pictures else ()
    return {name: torch.from_numpy(np.concatenate([picture[name] for picture in pictures])) for name in names}


@dataclass(frozen=True)
class Vision:
    """How a family's pictures enter its prompt and its model, as functions of their (width, height) and pixels.

    `tokens` writes a picture out in `placeholder`s and what stands between them, beginning and ending with a token;
    `patches` counts the vision tower's positions. `pixels` makes one picture's arrays, and `batch` the model's inputs
    from all pictures of a pack in reading order. `positions`, where a family has more than one position a token,
    gives (R, T) from which tokens are placeholders (T,) and the sample's pictures. `views`, where the tower takes
    pictures in their own shape, gives the (rows, columns) of its positions for each view of one. `enough` is the least
    (width, height) that a picture of a size may be decoded to: `pixels` scales it to no more.
    """

    placeholder: Token
    tokens: Callable[[Size], Runs]
    patches: Callable[[Size], int]
    pixels: Callable[[Seen], Pixels]
    facts: str
    """Names everything `tokens`, `patches` and `wrap` depend on, for the cache of lengths."""
    wrap: Wrap = field(default_factory=Wrap)
    batch: Callable[[Sequence[Pixels]], dict[str, Any]] = lay_end_to_end
    positions: Callable[[np.ndarray, Sequence[Pixels]], np.ndarray] | None = None
    views: Callable[[Size], Sequence[tuple[int, int]]] | None = None
    enough: Callable[[Size], Size] = all_of_it

    def placeholders(self, size: Size) -> int:
        """How many tokens of a picture of this size are replaced."""
        return sum(count for part, count in self.tokens(size) if part == self.placeholder)
