"""What a model says to a few held-out rows each time it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from ..conflicts import silent
from ..data.encode import Encoder
from ..data.sample import Sample
from ..errors import SampleError
from ..generate import answer, refuse_long
from ..recipe import Recipe
from .jsonlines import JsonLines
from .trainers import Lasting

LONGEST = 128
"""Tokens of an answer."""
FEW, LOOKED_AT = 4, 16
"""Rows that are answered where the recipe does not say how many, of so many that are held out."""


class Generations(TrainerCallback):
    """Appends the likeliest answer to each sample's last question: step, where, id, prompt, expected, answer.

    Made before training, of samples that leave their answers room.
    """

    def __init__(self, path: Path, trainer: Lasting, encoder: Encoder, samples: Sequence[Sample]) -> None:
        self.lines, self.trainer, self.encoder = JsonLines(path), trainer, encoder
        self.samples = [_question(sample) for sample in samples]
        self.expected = [sample.turns[_answered(sample)].shown for sample in samples]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.lines.rewind(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for sample, expected in zip(self.samples, self.expected, strict=True):
            prompt = "\n".join(turn.shown for turn in sample.turns)
            with self.trainer.accelerator.autocast():  # what trains is in float32, on a base in 16 bits
                said = answer(self.trainer.model, self.encoder, sample, LONGEST)
            line = {"step": state.global_step, "where": sample.where, "id": sample.id}
            self.lines.append(line | {"prompt": prompt, "expected": expected, "answer": said})


def asked_of(recipe: Recipe, held_out: Sequence[Sample], model: PreTrainedModel, encoder: Encoder) -> list[Sample]:
    """The rows that are to be answered: the first `eval.generate`, else a few of the first that leave room for it.

    Raises SampleError for a sample that was asked for and leaves its answer no positions.
    """
    if (count := recipe.eval.generate) is not None:
        found = [held_out[at] for at in range(min(count, len(held_out)))]
        for sample in found:
            _refuse_long(model, encoder, sample)
        return found
    if silent(recipe):
        return []
    return list(islice(_with_room(held_out, model, encoder), FEW))


def _with_room(held_out: Sequence[Sample], model: PreTrainedModel, encoder: Encoder) -> Iterator[Sample]:
    for at in range(min(LOOKED_AT, len(held_out))):
        sample = held_out[at]
        with suppress(SampleError):
            _refuse_long(model, encoder, sample)
            yield sample


def _refuse_long(model: PreTrainedModel, encoder: Encoder, sample: Sample) -> None:
    refuse_long(model, sample, len(encoder.encode_prompt(_question(sample))), LONGEST)


def _question(sample: Sample) -> Sample:
    return replace(sample, turns=sample.turns[: _answered(sample)])


def _answered(sample: Sample) -> int:
    """The turn of the last answer."""
    return max(at for at, turn in enumerate(sample.turns) if turn.role == "assistant")
