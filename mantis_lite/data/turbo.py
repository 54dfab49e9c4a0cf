"""Pictures in a fraction of Pillow's time: JPEGs by libjpeg-turbo, as large as the model needs, scaled by torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import PIL.Image
import torch
from PIL.Image import Resampling
from torch.nn.functional import interpolate

from ..errors import RecipeError
from . import media
from .sample import Image, Sample
from .vision import Size

REDUCTIONS = (8, 4, 2)
"""By how much a JPEG may be smaller as it is decoded: whole blocks of 8 x 8 numbers become so many fewer pixels."""

COLOURS = ("YCbCr", "Gray")
"""JPEGs whose colours are turned into red, green and blue in one way; Pillow has the others."""

MODES = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}
"""Filters that torch has for bytes, with Pillow's coefficients; the rest is left to Pillow."""


def require_turbo() -> None:
    """Raises RecipeError where what media.backend=fast needs is not installed."""
    if find_spec("simplejpeg") is None:
        raise RecipeError(
            "media.backend: fast needs simplejpeg, which is not installed\n"
            '  pip install "mantis-lite[fast]", or set media.backend=pil.'
        )


class Turbo:
    """A picture that is cropped and scaled by its (width, height), like one of Pillow's, and has perhaps fewer pixels.

    `pixels` are (H, W, 3) bytes.
    """

    def __init__(self, pixels: np.ndarray, size: Size) -> None:
        self.pixels, self.size = pixels, size

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.pixels

    def crop(self, box: tuple[int, int, int, int]) -> Turbo:
        """What is within left, top, right and bottom, in pixels of `size`."""
        height, width = self.pixels.shape[:2]
        across, down = width / self.size[0], height / self.size[1]
        left, top, right, bottom = (round(side * by) for side, by in zip(box, (across, down) * 2, strict=True))
        return Turbo(self.pixels[top:bottom, left:right], (box[2] - box[0], box[3] - box[1]))

    def resize(self, size: Size, resample: int = Resampling.BICUBIC) -> Turbo:
        """The picture scaled to another size, with as many pixels."""
        height, width = self.pixels.shape[:2]
        if size == (width, height):
            return Turbo(self.pixels, size)
        mode = MODES.get(Resampling(resample))
        if mode is None:
            return Turbo(np.asarray(PIL.Image.fromarray(self.pixels).resize(size, resample)), size)
        planes = torch.from_numpy(self.pixels).permute(2, 0, 1)[None]
        scaled = interpolate(planes, size[::-1], mode=mode, antialias=True)[0]
        return Turbo(scaled.permute(1, 2, 0).numpy(), size)


def open_turbo(image: Image, sample: Sample, max_size: int | None, enough: Callable[[Size], Size]) -> Turbo:
    """As `media.open_image`, with no fewer pixels than are `enough` for a picture of its size; raises SampleError.

    What libjpeg-turbo does not take without a word is decoded, or refused, by Pillow.
    """
    with media.opened(image, sample) as picture:
        orientation = media.orientation_of(picture)
        size = media.upright(picture.size, orientation)
        wanted = media.fitted(size, max_size)
        pixels = _decoded(picture, media.upright(enough(size) if wanted == size else wanted, orientation))
        if pixels is None:
            pixels = np.array(media.decoded(picture))
        elif orientation in media.UPRIGHT:
            pixels = np.array(PIL.Image.fromarray(pixels).transpose(media.UPRIGHT[orientation]))
        found = Turbo(pixels, size)
        return found if wanted == size else found.resize(wanted)


def _decoded(picture: PIL.Image.Image, needed: Size) -> np.ndarray | None:
    """A JPEG's pixels (H, W, 3), not yet upright, at least as many as needed; None where Pillow must look."""
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
        sizes = [(-(-width // by), -(-height // by)) for by in REDUCTIONS]
        least = next((size for size in sizes if size[0] >= needed[0] and size[1] >= needed[1]), (width, height))
        return simplejpeg.decode_jpeg(content, min_width=least[0], min_height=least[1])
    except ValueError:
        return None
