"""Small pictures of one coloured shape each, drawn from a seed: what Tiny Mantis was brought up on."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from PIL import Image, ImageDraw

SIDE = 56
COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 60),
    "blue": (36, 82, 214),
    "yellow": (244, 211, 40),
    "purple": (142, 45, 168),
    "orange": (247, 127, 0),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
_FINE = 4  # drawn this many times larger, then shrunk: smooth edges


class Thing(NamedTuple):
    """What a picture shows."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)


def draw(thing: Thing, rng: random.Random) -> Image.Image:
    """One RGB picture, 56 x 56 px; size, place, tilt, shade and background are drawn from `rng`."""
    side = SIDE * _FINE
    radius = rng.uniform(0.30, 0.42) * side
    centre = [rng.uniform(radius, side - radius) for _ in "xy"]
    picture = _background(rng).resize((side, side), Image.Resampling.BICUBIC)
    colour = tuple(max(0, min(255, level + rng.randint(-14, 14))) for level in COLOURS[thing.colour])
    _paint(ImageDraw.Draw(picture), thing.shape, centre, radius, rng.uniform(-0.15, 0.15), colour)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def _background(rng: random.Random) -> Image.Image:
    """Soft grey clouds, 4 x 4 px, neither as dark as black nor as light as white."""
    level = rng.randint(90, 170)
    clouds = Image.new("RGB", (4, 4))
    clouds.putdata([tuple(level + rng.randint(-18, 18) for _ in "rgb") for _ in range(16)])
    return clouds


def _paint(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    centre: list[float],
    radius: float,
    tilt: float,
    colour: tuple[int, ...],
) -> None:
    x, y = centre
    if shape in ("circle", "ring"):
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            canvas.ellipse(box, fill=colour)
        else:
            canvas.ellipse(box, outline=colour, width=round(radius * 0.36))
        return
    corners = {
        "square": [(0.95, math.pi * (0.25 + 0.5 * k)) for k in range(4)],
        "triangle": [(1.0, math.pi * (-0.5 + 2 / 3 * k)) for k in range(3)],
        "star": [(1.0 if k % 2 == 0 else 0.42, math.pi * (-0.5 + 0.2 * k)) for k in range(10)],
        "cross": [
            (reach, math.pi / 2 * k + turn)
            for k in range(4)
            for reach, turn in ((0.97, -0.28), (0.97, 0.28), (0.38, math.pi / 4))
        ],
    }[shape]
    canvas.polygon(
        [
            (x + radius * reach * math.cos(turn + tilt), y + radius * reach * math.sin(turn + tilt))
            for reach, turn in corners
        ],
        fill=colour,
    )
