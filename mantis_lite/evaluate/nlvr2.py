"""NLVR2's public test set as Mantis asks it: is a statement about two pictures true (Suhr et al. 2019)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from .benchmark import Benchmark, Metrics
from .mantis_rows import parse as parse_row
from .mantis_rows import read_rows, right
from .question import Protocol, Question, Result


def read(source: str, protocol: Protocol) -> list[Question]:
    """Its options, True and False, are in another order in each row. Raises SampleError, DataError."""
    return [replace(question, group=_statement(question.id)) for question in read_rows(source, "nlvr2", "test")]


def parse(raw: str, question: Question, protocol: Protocol) -> str | None:
    """The letter; by the original, where none is read, that of true or false if one is in it, as in "untrue"."""
    found = parse_row(raw, question, protocol)
    if found is not None or protocol == "own":
        return found
    said = [word for word in ("true", "false") if word in raw.lower()]
    texts = [option.lower() for option in question.options]
    return question.letters[texts.index(said[0])] if len(said) == 1 and said[0] in texts else None


def consistency(results: Sequence[Result]) -> Metrics:
    """The share of statements all of whose pairs of pictures are answered rightly, where ids tell statements apart."""
    of: defaultdict[str, list[float]] = defaultdict(list)
    for result in results:
        if result.group:
            of[result.group].append(result.correct)
    return {"consistency": sum(map(min, of.values())) / len(of)} if of else {}


def _statement(name: str) -> str:
    """split-set-pair-sentence names a row; of a statement the pair differs."""
    found = re.fullmatch(r"(?:.*_)?(\w+-\d+)-\d+-(\d+)", name)
    return f"{found[1]}-{found[2]}" if found else ""


NLVR2 = Benchmark(
    name="nlvr2",
    source="TIGER-Lab/NLVR2:nlvr2:test",
    read=read,
    parse=parse,
    right=right,
    more=consistency,
    max_new_tokens=32,
    differences=(
        "a letter is read from what the answer says, and not from the first letter of its first word",
        "true and false are words, which 'untrue' and 'not true' do not say",
    ),
)
