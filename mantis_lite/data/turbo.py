"""Pictures in a fraction of Pillow's time: JPEGs by libjpeg-turbo, as large as the model needs, scaled by torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from math import ceil

import numpy as np
import PIL.Image
import torch
from PIL.Image import Resampling
from torch.nn.functional import interpolate

from ..errors import RecipeError
from . import media
from .sample import Image, Sample
from .vision import Size

REDUCTIONS = (8, 4, 2, 1)
"""By how much a JPEG may be smaller as it is decoded: of each block of 8 x 8 numbers fewer are needed then."""

COLOURS = ("YCbCr", "Gray")
"""JPEGs whose colours are turned into red, green and blue in one way; Pillow has the others."""

MODES = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic", Resampling.LANCZOS: "lanczos"}
"""Filters that torch has for bytes, as Pillow's; the rest is left to Pillow."""


def require_turbo() -> None:
    """Raises RecipeError where what media.backend=fast needs is not installed."""
    if find_spec("simplejpeg") is None:
        raise RecipeError(
            "media.backend: fast needs simplejpeg, which is not installed\n"
            '  pip install "mantis-lite[fast]", or set media.backend=pil.'
        )


class Turbo:
    """A picture that is cropped and scaled by its (width, height), like one of Pillow's, and may have fewer pixels.

    `pixels` are (H, W, 3) bytes, one of them for `by` x `by` of the picture, the last of a row or column for the rest.
    """

    def __init__(self, pixels: np.ndarray, size: Size, by: int = 1) -> None:
        self.pixels, self.size, self.by = pixels, size, by

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.pixels

    def crop(self, box: tuple[int, int, int, int]) -> Turbo:
        """What is within left, top, right and bottom, in pixels of `size`."""
        left, top, right, bottom = box
        x, y = round(left / self.by), round(top / self.by)
        width, height = right - left, bottom - top
        part = self.pixels[y : y + ceil(height / self.by), x : x + ceil(width / self.by)]
        return Turbo(part, (width, height), self.by)

    def resize(self, size: Size, resample: int = Resampling.BICUBIC) -> Turbo:
        """The picture scaled to another size, with as many pixels."""
        height, width = self.pixels.shape[:2]
        shown = min(width, self.size[0] / self.by), min(height, self.size[1] / self.by)
        if shown == size:
            return Turbo(self.pixels, size)
        mode = MODES.get(Resampling(resample))
        if mode is None or (mode == "lanczos" and torch.__version__ < "2.13"):
            return Turbo(np.array(PIL.Image.fromarray(self.pixels).resize(size, resample, (0, 0, *shown))), size)
        planes = torch.from_numpy(self.pixels).permute(2, 0, 1)[None]
        if shown == (width, height):
            found = interpolate(planes, size[::-1], mode=mode, antialias=True)
        else:  # by a factor, as the last pixels are shown in part; it rounds down, to no less than is asked for
            by = [(to + 1e-6) / of for to, of in zip(size, shown, strict=True)]
            found = interpolate(planes, scale_factor=by[::-1], mode=mode, antialias=True)[..., : size[1], : size[0]]
        return Turbo(found[0].permute(1, 2, 0).numpy(), size)


def open_turbo(image: Image, sample: Sample, max_size: int | None, enough: Callable[[Size], Size]) -> Turbo:
    """As `media.open_image`, with no fewer pixels than are `enough` for a picture of its size; raises SampleError.

    One that is turned upright has all of them. What libjpeg-turbo does not take without a word is decoded, or refused,
    by Pillow.
    """
    with media.opened(image, sample) as picture:
        orientation = media.orientation_of(picture)
        size = media.upright(picture.size, orientation)
        wanted = media.fitted(size, max_size)
        turn = media.UPRIGHT.get(orientation)
        needed = enough(size) if wanted == size else wanted
        found = _decoded(picture, needed if turn is None else picture.size)  # a part of a pixel stays the last one
        if found is None:
            found = Turbo(np.array(media.decoded(picture)), size)
        elif turn is not None:
            found = Turbo(np.array(PIL.Image.fromarray(found.pixels).transpose(turn)), size)
        return found if wanted == size else found.resize(wanted)


def _decoded(picture: PIL.Image.Image, needed: Size) -> Turbo | None:
    """A JPEG, not yet upright, with at least as many pixels as needed; None where Pillow must look."""
    if picture.format != "JPEG":
        return None
    import simplejpeg

    file = picture.fp  # type: ignore[attr-defined]
    file.seek(0)
    content = file.read()
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if (width, height) != picture.size or colours not in COLOURS:
            return None
        by = next(by for by in REDUCTIONS if (width >= by * needed[0] and height >= by * needed[1]) or by == 1)
        pixels = simplejpeg.decode_jpeg(content, min_width=ceil(width / by), min_height=ceil(height / by))
        return Turbo(pixels, (width, height), by)
    except ValueError:
        return None
