"""Questions about pictures of coloured shapes: those Tiny Mantis was brought up on, and one it was never asked."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .pictures import COLOURS, SHAPES, THINGS, Thing, draw

PICTURES_OF_A_THING = 24
"""How many pictures a written data set has of each coloured shape; its rows choose among them."""


class Exercise(NamedTuple):
    """What the pictures of a row show, in order, what is asked about them and what is right."""

    things: list[Thing]
    question: str
    answer: str


def odd_one_out(rng: random.Random) -> Exercise:
    """Four pictures: three show the same, one does not. The quickstart's task, held back from Tiny Mantis."""
    things = [rng.choice(THINGS)] * 4
    odd = rng.randrange(4)
    things[odd] = other_than(things[odd], rng)
    return Exercise(things, "Which image is the odd one out?", f"image {odd + 1}")


def describe_one(rng: random.Random) -> Exercise:
    return _describe(1, rng)


def describe_each(rng: random.Random) -> Exercise:
    """Two to four pictures, each named in order: what teaches which answer belongs to which picture."""
    return _describe(rng.randint(2, 4), rng)


def what_is(rng: random.Random) -> Exercise:
    """The colour or the shape of one picture among several."""
    things = _any_things(rng)
    at = rng.randrange(len(things))
    if rng.random() < 0.5:
        return Exercise(things, f"What colour is image {at + 1}?", things[at].colour)
    return Exercise(things, f"What shape is image {at + 1}?", things[at].shape)


def which_show(rng: random.Random) -> Exercise:
    """All pictures that show a thing, if any, among others that differ from it."""
    thing = rng.choice(THINGS)
    things = [thing if rng.random() < 0.4 else other_than(thing, rng) for _ in range(rng.randint(2, 4))]
    found = [f"image {at}" for at, shown in enumerate(things, 1) if shown == thing]
    return Exercise(things, f"Which images show {_named(thing)}?", ", ".join(found) or "none")


def how_many(rng: random.Random) -> Exercise:
    """The number of pictures that show a thing, none to all."""
    thing, count = rng.choice(THINGS), rng.randint(2, 4)
    shown = rng.randint(0, count)
    things = [thing] * shown + [other_than(thing, rng) for _ in range(count - shown)]
    rng.shuffle(things)
    return Exercise(things, f"How many images show {_named(thing)}?", str(shown))


def how_many_alike(rng: random.Random) -> Exercise:
    """How many of three pictures show the same as a first, none to all; Tiny Mantis was never asked this."""
    thing, alike = rng.choice(THINGS), rng.randint(0, 3)
    others = [thing] * alike + [other_than(thing, rng) for _ in range(3 - alike)]
    rng.shuffle(others)
    return Exercise([thing, *others], "How many images show the same as image 1?", str(alike))


def compare(rng: random.Random) -> Exercise:
    """Whether each picture shows the same as a given one, in order."""
    thing = rng.choice(THINGS)
    things = [thing if rng.random() < 0.5 else other_than(thing, rng) for _ in range(rng.randint(2, 4))]
    at = rng.randrange(len(things))
    things[at] = thing
    answers = ["same" if shown == thing else "different" for shown in things]
    return Exercise(things, f"Compare each image with image {at + 1}.", ", ".join(answers))


def like(rng: random.Random) -> Exercise:
    """The one picture that shows the same as a given one."""
    thing = rng.choice(THINGS)
    things = [other_than(thing, rng) for _ in range(rng.randint(3, 4))]
    one, two = rng.sample(range(len(things)), 2)
    things[one] = things[two] = thing
    return Exercise(things, f"Which image is the same as image {one + 1}?", f"image {two + 1}")


QUESTIONS = (describe_each, what_is, which_show, how_many, compare, like)
"""The last lesson of Tiny Mantis: everything it can do with several pictures."""


def other_than(thing: Thing, rng: random.Random) -> Thing:
    """A thing of another colour, of another shape, or of both; a third of the time each."""
    colour = rng.choice([c for c in COLOURS if c != thing.colour])
    shape = rng.choice([s for s in SHAPES if s != thing.shape])
    return rng.choice([Thing(colour, thing.shape), Thing(thing.colour, shape), Thing(colour, shape)])


def row(name: str, exercise: Exercise, images: Sequence[str]) -> dict[str, Any]:
    """The exercise as a row of chat data, with the paths of its pictures."""
    return {
        "id": name,
        "images": list(images),
        "conversations": [
            {"from": "human", "value": _asked(exercise)},
            {"from": "gpt", "value": exercise.answer},
        ],
    }


def class_row(name: str, exercise: Exercise, images: Sequence[str]) -> dict[str, Any]:
    """The exercise as a row of classification data: its answer is the class."""
    return {"id": name, "images": list(images), "prompt": _asked(exercise), "label": exercise.answer}


def number_row(name: str, exercise: Exercise, images: Sequence[str]) -> dict[str, Any]:
    """The exercise as a row of regression data: its answer is a number."""
    return {"id": name, "images": list(images), "prompt": _asked(exercise), "label": float(exercise.answer)}


def drawn(number: int) -> tuple[Exercise, list[bytes]]:
    """One of Tiny Mantis' exercises by its number, and its pictures as PNG files."""
    rng = random.Random(number)
    exercise = QUESTIONS[number % len(QUESTIONS)](rng)
    files = [io.BytesIO() for _ in exercise.things]
    for thing, file in zip(exercise.things, files, strict=True):
        draw(thing, rng).save(file, "PNG")
    return exercise, [file.getvalue() for file in files]


def write(
    folder: Path,
    rows: int,
    held_out: int,
    seed: int,
    exercise: Callable[[random.Random], Exercise] = odd_one_out,
    as_row: Callable[[str, Exercise, Sequence[str]], dict[str, Any]] = row,
) -> None:
    """Write a data set of an exercise: `train.jsonl` and `held_out.jsonl`, sharing no picture, and their PNG files."""
    for split, count in (("train", rows), ("held_out", held_out)):
        rng = random.Random(f"{seed} {split}")
        files = _write_pictures(folder, Path("pictures") / split, rng)
        drawn = (exercise(rng) for _ in range(count))
        lines = [
            json.dumps(as_row(f"{split}_{at}", found, [rng.choice(files[thing]) for thing in found.things]))
            for at, found in enumerate(drawn)
        ]
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _asked(exercise: Exercise) -> str:
    return "<image>" * len(exercise.things) + exercise.question


def _write_pictures(folder: Path, inside: Path, rng: random.Random) -> dict[Thing, list[str]]:
    """Draw pictures of every thing; returns their paths relative to `folder`."""
    (folder / inside).mkdir(parents=True, exist_ok=True)
    files = {
        thing: [f"{inside.as_posix()}/{thing.colour}-{thing.shape}-{k}.png" for k in range(PICTURES_OF_A_THING)]
        for thing in THINGS
    }
    for thing, paths in files.items():
        for path in paths:
            draw(thing, rng).save(folder / path)
    return files


def _describe(count: int, rng: random.Random) -> Exercise:
    things = [rng.choice(THINGS) for _ in range(count)]
    question = "What is in each image?" if count > 1 else "What is in the image?"
    return Exercise(things, question, ", ".join(map(_named, things)))


def _any_things(rng: random.Random) -> list[Thing]:
    return [rng.choice(THINGS) for _ in range(rng.randint(2, 4))]


def _named(thing: Thing) -> str:
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing}"
