"""Mementos: what happens in a sequence of pictures, told in a paragraph (Wang et al. 2024, arXiv:2401.10529)."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.columns import Fault, kind_of, pictures_of
from ..data.sample import Image, Sample, Turn
from ..data.source import open_source
from ..errors import DataError, SampleError
from ..recipe import SourceRecipe
from .benchmark import Benchmark, Metrics
from .judge import Judge, JudgeError
from .keywords import Overlap, Synonyms, as_upstream, as_wanted, keywords, overlap
from .question import Protocol, Question, Result

ASKED = "Write a description for the given image sequence in a single paragraph, what is happening in this episode?"
SUBSETS = ("cmc", "dl", "robo")
MOST_PICTURES = 13
"""The original hands on so many of a sequence, and drops the rest."""
SYNONYMS = "synonyms.json"

TO_JUDGE = """Two paragraphs tell what happens in the same pictures: the first is a person's, the second a model's.
List the objects and the actions that each of them names.

An object is a thing, a person or an animal that could be touched, in two words at most. An action is what one of these
objects does, a word or a phrase, its verb in the base form. Where the paragraphs call one object or action by different
words, write the same word in all lists.

For example, of "A boy throws a red ball, and his puppy runs after it." and "A dog chases a ball on the grass, barking."
the lists are:
Object list 1: [boy, ball, dog]
Action list 1: [throw, run after]
Object list 2: [dog, ball, grass]
Action list 2: [run after, bark]

Paragraph 1: {wanted}

Paragraph 2: {said}

Answer with these four lines and nothing else:
Object list 1: [...]
Action list 1: [...]
Object list 2: [...]
Action list 2: [...]"""

LISTS = ("Object list 1", "Action list 1", "Object list 2", "Action list 2")
KINDS = {"objects": 1, "actions": 2}
"""What is listed, and of how many words in a row the original looks for synonyms."""

log = logging.getLogger("mantis_lite")


def read(source: str, protocol: Protocol) -> list[Question]:
    """The sequences of a folder, or of the hub. Raises SampleError, DataError.

    A folder has NAME_description.csv for cmc, dl and robo, and single_image_NAME/ID/1.png and so on, perhaps in
    images/.
    """
    if not Path(source).exists():
        return [question for name in SUBSETS for question in _of_hub(source, name, protocol)]
    found = [question for name in SUBSETS for question in _of_folder(Path(source), name, protocol)]
    if not found:
        remedy = f"There are {', '.join(f'{name}_description.csv' for name in SUBSETS)}, of which one is enough."
        raise DataError(f"{source}: has no descriptions in it\n  {remedy}")
    return found


def near(raw: str | None, question: Question, protocol: Protocol) -> dict[str, Any]:
    """The words that an answer shares with the description."""
    return overlap(keywords(raw or ""), keywords(question.answer))._asdict()


def right(parsed: str | None, question: Question, protocol: Protocol) -> float:
    """The F1 of the words."""
    return near(parsed, question, protocol)["f1"]


def means(results: Sequence[Result]) -> Metrics:
    """Of what is kept of each row."""
    kept = [result.scores or {} for result in results]
    return {key: float(np.mean([each[key] for each in kept])) for key in Overlap._fields}


def judged(judge: Judge, synonyms: Mapping[str, Synonyms]) -> Benchmark:
    """The benchmark with objects and actions as a judge lists them, which is asked as rows are answered."""
    known = {kind: len(words) for kind, words in synonyms.items()}
    told = {"judge": judge.model, "judge_prompt": TO_JUDGE, "synonyms": known}
    return replace(MEMENTOS, scores=partial(_judged, judge, synonyms), more=_judged_means, told=told)


def read_synonyms(source: str) -> dict[str, Synonyms]:
    """{"objects": {word: those that it may stand for}, "actions": ...} of a folder, if it has such a file.

    Raises DataError, also for the benchmark's own graphs alone: they are pickles, which can run anything as they are
    read.
    """
    file = Path(source) / SYNONYMS
    remedy = f'Write {{"objects": {{"pup": ["dog"]}}, "actions": {{}}}} to {SYNONYMS}'
    if not file.is_file():
        if pickles := sorted(file.parent.glob("sym_graphs/*.pkl")):
            found = "a pickle, which can run anything as it is read, and is not"
            raise DataError(f"{pickles[0]}: {found}\n  {remedy}, or take the pickles away to compare without synonyms.")
        return {kind: {} for kind in KINDS}
    try:
        found = json.loads(file.read_text())
        return {kind: {str(word): _words(of) for word, of in found[kind].items()} for kind in KINDS}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DataError(f"{file}: not two mappings of words to words\n  {remedy}.") from None


def _words(found: Any) -> list[str]:
    words = [found] if isinstance(found, str) else found
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise TypeError(kind_of(found))
    return words


def read_lists(reply: str) -> list[list[str]]:
    """The four lists of a judge's reply, in order. Raises JudgeError."""
    found = []
    for name in LISTS:
        lists = re.findall(rf"^\W*{name}\W*:\s*\[(.*)\]", reply, re.M)
        if len(lists) != 1:
            raise JudgeError(f"{name} is {len(lists)} times in the reply")
        found.append([word.strip(" '\"") for word in lists[0].split(",")])
    return found


def _judged(
    judge: Judge,
    synonyms: Mapping[str, Synonyms],
    raw: str | None,
    question: Question,
    protocol: Protocol,
) -> dict[str, Any]:
    """What the local measure says, and the judge; of a reply that cannot be used, why."""
    found = near(raw, question, protocol)
    reply = None
    try:
        reply = judge(TO_JUDGE.format(wanted=question.answer, said=raw or ""))
        lists = read_lists(reply)
    except JudgeError as error:
        return found | {"judge_failed": str(error), "reply": reply}
    for (kind, most), wanted, said in zip(KINDS.items(), lists[:2], lists[2:], strict=True):
        if protocol == "upstream":
            scores = overlap(as_upstream(said, wanted, synonyms[kind], most), wanted)
        else:
            wanted, said = ([word.lower() for word in words if word] for words in (wanted, said))
            scores = overlap(as_wanted(said, wanted, synonyms[kind]), wanted)
        found |= {f"{kind}_{key}": value for key, value in scores._asdict().items()}
    return found | {"reply": reply}


def _judged_means(results: Sequence[Result]) -> Metrics:
    """Over the rows that were judged, and of each subset; how many could not be is said."""
    kept = [(result.category, result.scores or {}) for result in results]
    sound = [(name, scores) for name, scores in kept if "judge_failed" not in scores]
    found = means(results) | {"judge_failed": float(len(kept) - len(sound))}
    keys = [f"{kind}_{key}" for kind in ("objects", "actions") for key in Overlap._fields]
    for key in keys if sound else ():
        found[key] = float(np.mean([scores[key] for _, scores in sound]))
        for subset in sorted({name for name, _ in sound}):
            found[f"{subset}/{key}"] = float(np.mean([scores[key] for name, scores in sound if name == subset]))
    return found


def _of_hub(source: str, name: str, protocol: Protocol) -> Iterator[Question]:
    rows = open_source(SourceRecipe(path=f"{source}:mementos:single_image_{name}"))
    for at in range(len(rows)):
        row, where = rows.row(at), rows.where(at)
        try:
            images, _ = pictures_of(row, rows.media)
            told = row.get("answer")
            if not images or not isinstance(told, str) or not told:
                raise Fault("no pictures or no description", "Give the benchmark's own columns, images and answer.")
        except Fault as fault:
            raise SampleError(where, fault.found, fault.remedy) from None
        yield _question(where, f"{name}-{row.get('id', at + 1)}", images, told, name, protocol)


def _of_folder(folder: Path, name: str, protocol: Protocol) -> Iterator[Question]:
    file = folder / f"{name}_description.csv"
    if not file.is_file():
        return
    frames = next((base for base in (folder / "images", folder) if (base / f"single_image_{name}").is_dir()), folder)
    # One of the published files ends a character in its middle; others have curly quotes, which the original spoils.
    text = file.read_bytes().decode("latin-1" if protocol == "upstream" else "utf-8-sig", "replace")
    if odd := text.count("\ufffd"):
        log.warning("mementos: %s has %d characters that are no UTF-8: each is a mark instead", file.name, odd)
    lines = io.StringIO(text, newline="")
    for number, row in enumerate(csv.DictReader(lines), 2):
        where = f"{file.name}:{number}"
        picture = next((row[key] for key in ("image_name", "image") if row.get(key)), None)
        told = next((row[key] for key in ("gt_description", "description") if row.get(key)), None)
        if not picture or not told:
            raise SampleError(where, "no picture or no description", "Give the benchmark's own columns.")
        place = frames / f"single_image_{name}" / Path(picture).stem
        files = [path for path in place.glob("*.*") if path.stem.isdecimal()] if place.is_dir() else []
        if not files:
            raise SampleError(where, f"no numbered pictures in {place}", "Fetch them, or drop the row.")
        images = [Image(path) for path in sorted(files, key=lambda path: int(path.stem))]
        yield _question(where, f"{name}-{Path(picture).stem}", images, told, name, protocol)


def _question(where: str, name: str, images: Sequence[Image], answer: str, subset: str, protocol: Protocol) -> Question:
    kept = images[:MOST_PICTURES] if protocol == "upstream" else images
    turn = Turn("user", (ASKED, *kept) if protocol == "upstream" else (*kept, ASKED))
    return Question(name, Sample(where, name, (turn,)), "description", answer, (), subset)


MEMENTOS = Benchmark(
    name="mementos",
    source="Mantis-VL/MIQA_eval",
    read=read,
    parse=lambda raw, question, protocol: raw.strip() or None,
    right=right,
    scores=near,
    more=means,
    max_new_tokens=512,
    upstream_new_tokens=2048,
    differences=(
        "the score is the F1 of the words that a description shares with the benchmark's, by their stems; objects and "
        "actions are compared where a judge is named, by a prompt of our own",
        "all pictures are shown, in front of the question; the original shows the first 13, behind it",
        "with a judge, each word that is said too much counts, and any that is wanted may be said by a synonym; in the "
        "original each is once, and all that is said when none is left counts as one mistake",
        "descriptions are read as UTF-8; the original reads them as Latin-1",
    ),
)
