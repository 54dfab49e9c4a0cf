"""What a model says to a few held-out rows each time it is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..data.encode import Encoder
from ..data.sample import Sample
from ..generate import answer, refuse_long
from .jsonlines import JsonLines
from .trainers import Lasting

GENERATIONS = "generations.jsonl"
LONGEST = 128
"""Tokens of an answer."""


class Generations(TrainerCallback):
    """Appends the likeliest answer to each sample's last question: step, where, id, prompt, expected, answer.

    Made before training; raises SampleError for a sample that leaves its answer no positions.
    """

    def __init__(self, path: Path, trainer: Lasting, encoder: Encoder, samples: Sequence[Sample]) -> None:
        self.lines, self.trainer, self.encoder = JsonLines(path), trainer, encoder
        self.samples = [replace(sample, turns=sample.turns[: _answered(sample)]) for sample in samples]
        self.expected = [sample.turns[_answered(sample)].shown for sample in samples]
        for sample in self.samples:
            refuse_long(trainer.model, sample, len(encoder.encode_prompt(sample)), LONGEST)

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


def _answered(sample: Sample) -> int:
    """The turn of the last answer."""
    return max(at for at, turn in enumerate(sample.turns) if turn.role == "assistant")
