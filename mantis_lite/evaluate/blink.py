"""BLINK: fourteen kinds of seeing that people do in a blink (Fu et al. 2024, arXiv:2404.12390)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.columns import Fault, read_image, short
from ..data.sample import Sample, Turn
from ..data.source import Rows, open_source
from ..errors import DataError, SampleError
from ..recipe import SourceRecipe
from .benchmark import Benchmark
from .mantis_rows import letter_of, right
from .parsing import choice
from .question import Protocol, Question

TASKS = (
    *("Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw"),
    *("Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance"),
    *("Semantic_Correspondence", "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity"),
)
DISCLAIMED = ("Forensic_Detection", "Jigsaw", "Art_Style")
DISCLAIMER = (
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give your "
    "assessment on this question. You don't need to identify the real people. You just need to analyze based on the "
    "information I gave you.\n\n"
)
"""What the benchmark's own prompts of three tasks begin with."""


def read(source: str, protocol: Protocol) -> list[Question]:
    """The validation split of all tasks, or of those that a local folder has. Raises SampleError, DataError."""
    if not Path(source).exists():
        specs = {task: SourceRecipe(path=f"{source}:{task}:val") for task in TASKS}
    else:
        specs = {task: SourceRecipe(path=str(Path(source) / task), split="val") for task in TASKS}
        specs = {task: spec for task, spec in specs.items() if Path(spec.path).is_dir()}
        if not specs:
            raise DataError(
                f"{source}: no task's folder is in it\n  As on the hub, there is one each: {', '.join(TASKS)}."
            )
    questions = []
    for task, spec in specs.items():
        rows = open_source(spec)
        questions += [_question(rows.row(at), rows, at, task) for at in range(len(rows))]
    return questions


def _question(row: Mapping[str, Any], rows: Rows, at: int, task: str) -> Question:
    where, name = rows.where(at), str(row.get("idx") or f"val_{task}_{at + 1}")
    try:
        given = [(key, row[key]) for key in (f"image_{n}" for n in range(1, 5)) if row.get(key) is not None]
        images = [read_image(found, f'"{key}"', rows.media) for key, found in given]
        options = tuple(map(str, row.get("choices") or ()))
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise Fault(f'"prompt" is {short(prompt)}', "Give the benchmark's own column.")
        if row.get("answer") == "hidden":
            raise Fault(
                "the answer is hidden", "It is of the test split: only the benchmark's own server can score it."
            )
        answer = letter_of(str(row.get("answer")), options)
    except Fault as fault:
        raise SampleError(where, fault.found, fault.remedy, name) from None
    text = DISCLAIMER + prompt if task in DISCLAIMED else prompt
    return Question(name, Sample(where, name, (Turn("user", (*images, text)),)), "choice", answer, options, task)


def parse(raw: str, question: Question, protocol: Protocol) -> str | None:
    """The letter; by the benchmark's own code, where the answer or its last paragraph has one of them in brackets.

    That is a word by itself, so "(B)." is none. Where there is none, or several, that code asks GPT-3.5; here the
    answer counts as unread (zeyofu/BLINK_Benchmark, eval/test_benchmark.py, and Mantis' fork of it, which do the same).
    """
    if protocol == "own":
        return choice(raw, question.options)
    if raw in set(question.letters):
        return raw
    for part in (raw.split("\n\n")[-1], raw):
        found = [letter for letter in question.letters if f"({letter})" in part.split()]
        if len(found) == 1:
            return found[0]
    return None


BLINK = Benchmark(
    name="blink",
    source="BLINK-Benchmark/BLINK",
    read=read,
    parse=parse,
    right=right,
    overall="categories",
    max_new_tokens=32,
    differences=(
        "a letter is read from what the answer says; the benchmark's own code asks GPT-3.5 where it finds none",
        "answers have 32 tokens at most",
    ),
)
