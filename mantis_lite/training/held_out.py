"""What a model says to a few held-out rows each time it is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from ..data.encode import Encoder
from ..data.sample import Sample
from ..generate import answer
from .jsonlines import JsonLines

GENERATIONS = "generations.jsonl"
LONGEST = 128
"""Tokens of an answer."""


class Generations(TrainerCallback):
    """Appends the likeliest answer to each sample's last question: step, where, id, prompt, expected, answer."""

    def __init__(self, path: Path, model: PreTrainedModel, encoder: Encoder, samples: Sequence[Sample]) -> None:
        self.lines, self.model, self.encoder = JsonLines(path), model, encoder
        self.samples = [replace(sample, turns=sample.turns[: _answered(sample)]) for sample in samples]
        self.expected = [_text(sample, _answered(sample)) for sample in samples]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.lines.rewind(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for sample, expected in zip(self.samples, self.expected, strict=True):
            prompt = "\n".join(_text(sample, at) for at in range(len(sample.turns)))
            said = answer(self.model, self.encoder, sample, LONGEST)
            line = {"step": state.global_step, "where": sample.where, "id": sample.id}
            self.lines.append(line | {"prompt": prompt, "expected": expected, "answer": said})


def _answered(sample: Sample) -> int:
    """The turn of the last answer."""
    return max(at for at, turn in enumerate(sample.turns) if turn.role == "assistant")


def _text(sample: Sample, at: int) -> str:
    return "".join(part if isinstance(part, str) else "<image>" for part in sample.turns[at].content)
