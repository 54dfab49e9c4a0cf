"""Choosing among options: a prompt that is read once for all of them, against each option alone, and a written answer.

    python -m benchmarks.likelihood [--questions 32] [--repeats 5]

Tiny Mantis, on drawn rows of several pictures, each with four options of about ten tokens. Ways run in turn, and those
that score these options must find the same log-probabilities within 1e-3.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from mantis_lite.agreement import logits_of
from mantis_lite.chat import MantisChat
from mantis_lite.data.encode import Encoder
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.evaluate.asking import continuation
from mantis_lite.generate import ends_of, generate
from mantis_lite.prefill import greedy, log_likelihoods, read
from mantis_lite.tiny.pictures import THINGS
from mantis_lite.tiny.tasks import drawn

from . import results

OPTIONS = 4


def questions(count: int) -> list[tuple[Sample, list[str]]]:
    """Drawn pictures with four sentences of which to choose."""
    made = []
    for at in range(count):
        rng = random.Random(at)
        _, pictures = drawn(6 * at)  # the first kind: what is in each of several pictures
        options = [f"all of them show {thing}" for thing in rng.sample(list(THINGS), OPTIONS)]
        turn = Turn("user", (*map(Image, pictures), "What is it that they show?"))
        made.append((Sample(f"question {at}", None, (turn,)), options))
    return made


def once(model: PreTrainedModel, encoder: Encoder, asked: Sequence[tuple[Sample, list[str]]]) -> list[list[float]]:
    prompts = read(model, encoder, [encoder.encode_prompt(sample) for sample, _ in asked])
    ids = [[continuation(encoder, option) for option in options] for _, options in asked]
    return log_likelihoods(model, prompts, ids)


def letters(model: PreTrainedModel, encoder: Encoder, asked: Sequence[tuple[Sample, list[str]]]) -> list[list[float]]:
    return once(model, encoder, [(sample, list("ABCD")) for sample, _ in asked])


def alone(model: PreTrainedModel, encoder: Encoder, asked: Sequence[tuple[Sample, list[str]]]) -> list[list[float]]:
    found = []
    for sample, options in asked:
        scores = []
        for option in options:
            answered = replace(sample, turns=(*sample.turns, Turn("assistant", (option,))))
            ids = torch.tensor(continuation(encoder, option))
            logits = logits_of(model, encoder, [answered])[: len(ids)]
            scores.append(logits.log_softmax(-1).gather(1, ids[:, None]).sum().item())
        found.append(scores)
    return found


def written(model: PreTrainedModel, encoder: Encoder, asked: Sequence[tuple[Sample, list[str]]]) -> None:
    prompts = read(model, encoder, [encoder.encode_prompt(sample) for sample, _ in asked])
    greedy(model, prompts, ends_of(model, encoder), 32)


def explained(model: PreTrainedModel, encoder: Encoder, asked: Sequence[tuple[Sample, list[str]]]) -> None:
    """As a model that explains itself: nothing ends the answer before its 32 tokens."""
    greedy(model, read(model, encoder, [encoder.encode_prompt(sample) for sample, _ in asked]), [], 32)


def one_by_one(model: PreTrainedModel, encoder: Encoder, asked: Sequence[tuple[Sample, list[str]]]) -> None:
    """As most harnesses ask: each question by itself, by transformers' own generate."""
    for sample, _ in asked:
        generate(model, encoder, [encoder.encode_prompt(sample)], 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=results.REPEATS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chat = MantisChat("tiny")
    asked = questions(given.questions)
    ways: dict[str, Callable] = {
        "letters": letters,
        "once": once,
        "alone": alone,
        "written": written,
        "explained": explained,
        "one_by_one": one_by_one,
    }

    def same(found: list[Any]) -> None:
        scores = dict(zip(ways, found, strict=True))
        np.testing.assert_allclose(scores["once"], scores["alone"], atol=1e-3)

    bound = {name: partial(way, chat.model, chat.encoder, asked) for name, way in ways.items()}
    seconds = results.interleaved(bound, given.repeats, same)
    per_second = {name: results.spread(given.questions / s for s in of) for name, of in seconds.items()}
    figures = {"questions": given.questions, "options": OPTIONS, "a_second": per_second}
    print("\n".join(lines(figures)))
    results.write("likelihood", figures)


def lines(figures: dict) -> list[str]:
    """The table of the docs."""
    said = {
        "letters": "a prompt read once, its options' letters scored",
        "once": "a prompt read once, options of ten tokens scored",
        "alone": "a prompt read with each option of ten tokens",
        "written": "a prompt read once, and an answer written to its end, of 1 to 32 tokens",
        "explained": "a prompt read once, and 32 tokens written",
        "one_by_one": "answers written one by one, by transformers' generate",
    }
    rows = [
        f"| {said[name]} | {of['median']:.1f} | {of['min']:.1f} to {of['max']:.1f} |"
        for name, of in figures["a_second"].items()
    ]
    return ["| way | questions a second, median | least to most |", "|---|---|---|", *rows]


if __name__ == "__main__":
    main()
