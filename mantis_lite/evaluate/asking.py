"""Questions -> what a model says to each: the likeliest answer, and how likely each choice is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Literal, NamedTuple

from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data.encode import Encoded, Encoder
from ..data.sample import Frame, Image, Sample, Turn
from ..errors import SampleError
from ..generate import ends_of, refuse_long, text_of
from ..models.load import loader_workers
from ..prefill import greedy, log_likelihoods, read
from .question import Question

Scoring = Literal["generate", "likelihood", "both"]
"""How a choice is made: by the answer that is written, by the likeliest letter, or by both; the first counts then."""

MOST_ROWS = 32
"""Prompts that are read at once."""

Watch = Callable[[Iterable["Said"], int], Iterable["Said"]]
"""Takes what is said to questions, in turn, and to how many, and hands it on."""


class Said(NamedTuple):
    """What came of the `number`-th question: the text that was written, and by letter how likely each choice is."""

    number: int
    raw: str | None
    logprobs: dict[str, float] | None


@dataclass(frozen=True)
class Asking:
    """How questions are asked; all of it may change an answer.

    `tokens` is how many those prompts have together that are read at once, unless one alone has more.
    """

    scoring: Scoring = "generate"
    max_new_tokens: int = 64
    tokens: int = 4096

    def writes(self, question: Question) -> bool:
        return self.scoring != "likelihood" or not question.options

    def weighs(self, question: Question) -> bool:
        return self.scoring != "generate" and bool(question.options)


def batches(encoder: Encoder, questions: Sequence[Question], tokens: int) -> list[list[int]]:
    """The questions by number, those of like length together, the longest first. Raises SampleError.

    The same wherever and however often it is asked, as how numbers are rounded depends on what is read at once.
    """
    lengths = []
    for found in encoder.measure([question.sample for question in questions]):
        if isinstance(found, SampleError):
            raise found
        lengths.append(found.tokens)
    made: list[list[int]] = []
    left = 0
    for number in sorted(range(len(questions)), key=lambda at: (-lengths[at], at)):
        if not made or lengths[number] > left or len(made[-1]) == MOST_ROWS:
            made.append([])
            left = tokens
        made[-1].append(number)
        left -= lengths[number]
    return made


def ask(
    model: PreTrainedModel,
    encoder: Encoder,
    questions: Sequence[Question],
    asked: Sequence[Sequence[int]],
    asking: Asking,
) -> Iterator[Said]:
    """What a model says to each question of the batches, in their order. Raises SampleError."""
    prompts: DataLoader = DataLoader(
        asked,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=partial(_encoded, encoder, questions),
        num_workers=loader_workers(),
    )
    weighed = {letter: continuation(encoder, letter) for question in questions for letter in question.letters}
    for numbers, batch in prompts:
        for number, prompt in zip(numbers, batch, strict=True):
            refuse_long(model, questions[number].sample, len(prompt), asking.max_new_tokens)
        yield from _said(model, encoder, [questions[number] for number in numbers], numbers, batch, weighed, asking)


def continuation(encoder: Encoder, text: str) -> list[int]:
    """The ids by which an answer of this text begins, behind a prompt and without what ends it."""
    asked = Sample("an option", None, (Turn("user", ("?",)),))
    answered = replace(asked, turns=(*asked.turns, Turn("assistant", (text,))))
    prompt, ids = encoder.encode_prompt(asked).input_ids.tolist(), encoder.encode(answered).input_ids.tolist()
    assert ids[: len(prompt)] == prompt, text
    return ids[len(prompt) : len(ids) - 1 - ids[::-1].index(encoder.token_id(encoder.template.end))]


def shown(sample: Sample) -> str:
    """A sample's turns as text, each in a line of its own."""
    return "\n".join(turn.shown for turn in sample.turns)


def named(image: Image) -> str:
    """What a picture is: its file, and of a clip's the frame; of bytes the beginning of their SHA-256."""
    if isinstance(image.source, bytes):
        return f"sha256:{sha256(image.source).hexdigest()[:16]}"
    return f"{image.source}#{image.at}" if isinstance(image, Frame) else str(image.source)


def as_upstream(sample: Sample, model_type: str) -> Sample:
    """The sample as the original's wrappers around a model hand it on.

    Texts of nothing but blanks are dropped. Idefics2's has all pictures first and joins the texts by a line's end; the
    LLaVA-style one's has a blank behind each picture (TIGER-AI-Lab/Mantis, mantis/mllm_tools).
    """
    (turn,) = sample.turns
    content: list = [part for part in turn.content if not isinstance(part, str) or part.strip("\n ")]
    if model_type not in ("idefics2", "llava"):
        return sample
    if model_type == "idefics2":
        texts = [part for part in content if isinstance(part, str)]
        content = [*(part for part in content if not isinstance(part, str)), "\n".join(texts)]
    else:
        content = [each for part in content for each in ([part] if isinstance(part, str) else [part, " "])]
    return replace(sample, turns=(Turn("user", tuple(content)),))


def _encoded(
    encoder: Encoder, questions: Sequence[Question], numbers: Sequence[int]
) -> tuple[Sequence[int], list[Encoded]]:
    return numbers, [encoder.encode_prompt(questions[number].sample) for number in numbers]


def _said(
    model: PreTrainedModel,
    encoder: Encoder,
    questions: Sequence[Question],
    numbers: Sequence[int],
    prompts: Sequence[Encoded],
    weighed: dict[str, list[int]],
    asking: Asking,
) -> Iterator[Said]:
    """Of one batch: its prompts are read once, whatever is asked of them."""
    prefilled = read(model, encoder, prompts)
    options = [question.letters if asking.weighs(question) else "" for question in questions]
    found = log_likelihoods(model, prefilled, [[weighed[letter] for letter in letters] for letters in options])
    writes = [at for at, question in enumerate(questions) if asking.writes(question)]
    answers: dict[int, str] = {}
    if writes:
        ids = greedy(model, prefilled.take(writes), ends_of(model, encoder), asking.max_new_tokens)
        answers = {at: text_of(encoder, answer) for at, answer in zip(writes, ids, strict=True)}
    for at, (number, letters, scores) in enumerate(zip(numbers, options, found, strict=True)):
        logprobs = dict(zip(letters, scores, strict=True)) if letters else None
        yield Said(number, answers.get(at), logprobs)
