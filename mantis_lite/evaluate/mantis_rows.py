"""The rows that Mantis' own benchmarks are written in: a question with options, or to be answered in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ..data.columns import Fault, kind_of, pictures_of, short
from ..data.sample import Image, Sample, Turn
from ..data.source import Rows, open_source
from ..errors import SampleError
from ..recipe import SourceRecipe
from .parsing import LABEL, bare, choice, labelled, upstream_choice, upstream_text
from .question import Protocol, Question

LETTER_ALONE = "Answer with the option's letter from the given choices directly."
IN_WORDS = (
    "Given the images, answer the following short answer vqa question:\nQ: {question}\n"
    'You can first give your analysis, and then give your final answer as "Final Answer:"'
)
MARK = "<image>"


def read_rows(source: str, inside: str, split: str) -> list[Question]:
    """The questions of what `open_rows` finds. Raises SampleError, DataError.

    A row has question, question_type (multi-choice or short-answer), images, options, answer, and mostly id and
    category (TIGER-AI-Lab/Mantis, mantis/benchmark).
    """
    rows = open_rows(source, inside, split)
    return [question_of(rows.row(at), rows, at) for at in range(len(rows))]


def open_rows(source: str, inside: str, split: str) -> Rows:
    """The rows of a file, of a dataset on the hub, or of the split of one's folder, whose Parquet may be `inside`."""
    if not Path(source).is_dir():
        return open_source(SourceRecipe(path=source))
    folder, lists = Path(source) / inside, [*Path(source).glob("*.json"), *Path(source).glob("*.jsonl")]
    if len(lists) == 1:
        return open_source(SourceRecipe(path=str(lists[0])))
    return open_source(SourceRecipe(path=str(folder if folder.is_dir() else source), split=split))


def question_of(row: Mapping[str, Any], rows: Rows, at: int) -> Question:
    """One row's question. Raises SampleError."""
    where = rows.where(at)
    try:
        images, _ = pictures_of(row, rows.media)
        kind = row.get("question_type")
        if kind not in ("multi-choice", "short-answer"):
            raise Fault(f'"question_type" is {short(kind)}', "The types are multi-choice and short-answer.")
        text = _text(row, "question")
        options = tuple(map(str, row.get("options") or ())) if kind == "multi-choice" else ()
        answer = _text(row, "answer")
        if kind == "multi-choice":
            answer = letter_of(answer, options)
            text = f"{text}{options_under(options)}\n{LETTER_ALONE}"
        else:
            text = IN_WORDS.format(question=text)
        turn = asked(text, images)
    except Fault as fault:
        raise SampleError(where, fault.found, fault.remedy, _id(row)) from None
    return Question(
        id=_id(row) or where,
        sample=Sample(where, _id(row), (turn,)),
        kind="choice" if options else "short",
        answer=answer,
        options=tuple(map(bare, options)),
        category=str(row.get("category") or ""),
    )


def asked(text: str, images: Sequence[Image]) -> Turn:
    """The user's turn: pictures at the marks of the text, those that have none in front of all. Raises Fault."""
    marks = text.count(MARK)
    if marks > len(images):
        raise Fault(f"{marks} {MARK} marks and {len(images)} pictures", "Give each mark a picture.")
    given = iter(images[len(images) - marks :])
    content: list[str | Image] = list(images[: len(images) - marks])
    for number, part in enumerate(text.split(MARK)):
        content += [*([next(given)] if number else []), *([part] if part else [])]
    return Turn("user", tuple(content))


def options_under(options: Sequence[str]) -> str:
    """Options as the original writes them: each on a line, behind a blank, with its letter unless it has it."""
    lines = zip(ascii_uppercase, options, strict=False)
    return "".join(f"\n {o}" if labelled(o, letter) else f"\n ({letter}) {o}" for letter, o in lines)


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The right letter, which a row gives as "B", "(B)" or "(B) a dog". Raises Fault."""
    alone, before = answer.strip("()\n "), LABEL.match(answer)
    letter = before[1] if before else alone.upper()
    if len(options) < 2 or letter not in set(ascii_uppercase[: len(options)]):
        remedy = "Give the letter of one of its options, as B; answers that are hidden cannot be scored."
        raise Fault(f"the answer is {short(answer)}, of {len(options)} options", remedy)
    return letter


def parse(raw: str, question: Question, protocol: Protocol) -> str | None:
    """A letter, or what is answered in words."""
    if protocol == "upstream":
        text = upstream_text(raw)
        return upstream_choice(raw, question.options) if question.options else text.lower()
    if question.options:
        return choice(raw, question.options)
    text = raw[raw.lower().rfind(LEAD) + len(LEAD) :] if LEAD in raw.lower() else raw
    return text.strip().strip(".").strip() or None


LEAD = "final answer:"
"""What the model is told to give its answer behind; the last time is meant."""


def right(parsed: str | None, question: Question, protocol: Protocol) -> float:
    """Whether the letter is the right one, or the words are, upper or lower case; the original strips brackets too."""
    wanted = question.answer.strip("()\n " if protocol == "upstream" else None)
    return float(parsed is not None and parsed.lower() == wanted.lower())


def _text(row: Mapping[str, Any], key: str) -> str:
    found = row.get(key)
    if not isinstance(found, str) or not found.strip():
        raise Fault(f'"{key}" is {kind_of(found) if found != "" else "empty"}', "Give a text.")
    return found


def _id(row: Mapping[str, Any]) -> str | None:
    return None if row.get("id") is None else str(row["id"])
