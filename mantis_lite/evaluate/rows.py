"""Rows of one's own, with their answers: what a model says to each turn, and how near it comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..agreement import at_answers
from ..data.collate import Batch, collate
from ..data.encode import Encoder
from ..data.mixture import sources_of_all
from ..data.prepare import Samples, read_rows
from ..data.sample import Turn
from ..data.schedule import pack_epoch
from ..data.shards import are_shards
from ..data.source import open_source
from ..models.load import loader_workers
from ..recipe import PackingRecipe, Recipe, Task
from .benchmark import Benchmark, Metrics
from .parsing import choice
from .question import Kind, Protocol, Question, Result

LETTER = re.compile(r"\(?([A-Z])[).]?")
"""An answer that is a letter."""

OPTION = re.compile(r"(?:^|[\s(])([A-Z])[).:]")
"""An option's letter in a question, as in "(A) a dog" or "B. a cat"."""

ANLS_LEAST = 0.5
"""Below it, an answer's similarity counts for nothing (Biten et al. 2019, https://arxiv.org/abs/1905.13648)."""


class Words(Tokenizer):
    """Words of any language; ROUGE's own knows a to z alone."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def own_rows(recipe: Recipe, encoder: Encoder, model: PreTrainedModel) -> Benchmark:
    """The rows of `data=` as a benchmark: each answer of a row is a question, asked with the turns before it.

    Its accuracy is that of choices where all answers are letters, else of answers to the letter; besides it has ROUGE-L
    and ANLS, and the loss, a mean over the answers' tokens. Raises SampleError, FitError, DataError.
    """
    task = _task_of(recipe)
    prepared = read_rows(recipe.data, recipe.packing, encoder, task)
    samples = prepared.train
    files = [Path(source.path).name.partition(".")[0] for source in recipe.data.sources]
    questions = _questions(samples)
    return Benchmark(
        name="-".join(files),
        source=", ".join(source.path for source in recipe.data.sources),
        read=lambda source, protocol: questions,
        parse=_parsed,
        right=lambda parsed, question, protocol: float(parsed == question.answer),
        scores=_near,
        more=partial(_means, partial(loss, model, encoder, samples, recipe.packing)),
        max_new_tokens=256,
        told={
            "data": recipe.data.model_dump(mode="json"),
            "task": task,
            "rejects": list(map(str, prepared.rejects)),
            "oversize": prepared.oversize,
        },
    )


def _task_of(recipe: Recipe) -> Task:
    """How rows are read: as those trained on were; but a model that nothing is said of may be asked about clips."""
    sources = [source for source in sources_of_all(recipe.data, recipe.task) if not are_shards(source.path)]
    first = [open_source(source, "video").row(0) for source in sources]
    return "video" if any(row.get("video") or row.get("videos") for row in first) else recipe.task


@torch.no_grad()
def loss(model: PreTrainedModel, encoder: Encoder, samples: Samples, packing: PackingRecipe) -> float:
    """The mean negative log-likelihood of a token that training would have trained, in nats; rows are packed.

    Logits are made where there is such a token, and nowhere else.
    """
    samples.weights = [1.0] * len(samples.weights)  # each row once
    packs: DataLoader = DataLoader(
        pack_epoch(samples, packing),  # type: ignore[arg-type]
        collate_fn=partial(_batch, samples, encoder),
        num_workers=loader_workers(),
    )
    total, count = 0.0, 0
    for batch in packs:
        logits, wanted = at_answers(model, batch)
        total += cross_entropy(logits, wanted.to(logits.device), reduction="sum").item()
        count += len(wanted)
    return total / count


def _batch(samples: Samples, encoder: Encoder, packs: list[list[int]]) -> Batch:
    return collate([encoder.encode(samples[at]) for at in packs[0]], encoder.vision.batch)


def _questions(samples: Samples) -> list[Question]:
    """Each answer of each row; where all of them are letters, they are choices."""
    asked: list[tuple[str, Any, str]] = []
    for sample in samples:
        answers = [at for at, turn in enumerate(sample.turns) if turn.role == "assistant"]
        for number, at in enumerate(answers, 1):
            name = sample.where if len(answers) == 1 else f"{sample.where}#{number}"
            asked.append((name, replace(sample, turns=sample.turns[:at]), _text(sample.turns[at])))
    letters = [LETTER.fullmatch(answer) for _, _, answer in asked]
    several = len({rows.name for rows in samples.rows}) > 1
    kind: Kind = "choice" if all(letters) else "short"
    given = [
        found[1] if kind == "choice" and found else answer for found, (_, _, answer) in zip(letters, asked, strict=True)
    ]
    return [
        Question(
            id=name,
            sample=sample,
            kind=kind,
            answer=answer,
            options=_letters(sample.turns[-1].shown, max(given)) if kind == "choice" else (),
            category=sample.where.rpartition(":")[0] if several else "",
        )
        for (name, sample, _), answer in zip(asked, given, strict=True)
    ]


def _letters(text: str, last: str) -> tuple[str, ...]:
    """The letters that a question's text gives its options, from A on; else those to the last that any row answers."""
    given = set(OPTION.findall(text))
    told = "".join(takewhile(given.__contains__, ascii_uppercase))
    return tuple(told if len(told) > 1 else ascii_uppercase[: max(2, ascii_uppercase.index(last) + 1)])


def _text(turn: Turn) -> str:
    return "".join(part for part in turn.content if isinstance(part, str)).strip()


def _parsed(raw: str, question: Question, protocol: Protocol) -> str | None:
    return choice(raw, question.options) if question.options else raw.strip()


def _near(raw: str | None, question: Question, protocol: Protocol) -> dict[str, Any] | None:
    """How near an answer in words comes."""
    if raw is None or question.options:
        return None
    found = RougeScorer(["rougeL"], tokenizer=Words()).score(question.answer, raw)["rougeL"].fmeasure
    alike = Levenshtein.normalized_similarity(question.answer.lower(), raw.strip().lower())
    return {"rouge_l": found, "anls": alike if alike >= ANLS_LEAST else 0.0}


def _means(of_loss: Any, results: Sequence[Result]) -> Metrics:
    """The loss, and means of what is kept of each row."""
    scores = [result.scores for result in results if result.scores]
    means = {key: float(np.mean([each[key] for each in scores])) for key in (scores[0] if scores else ())}
    return {"loss": of_loss()} | means
