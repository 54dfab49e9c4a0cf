"""What an answer in words says: the letter of a choice, as it is meant, or as the original Mantis reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

LEADS = ("final answer:", "the answer is", "answer:")
"""What stands before an answer, in the order in which the original looks for it."""

NAMED = re.compile(
    r"\b(?:answer|option|choice)(?:\s+is)?:?\s*[\W_]*([A-Z])\b(?!\s+[a-z]|\W*(?:and|or|&|/)\W*[A-Z]\b)", re.I
)
"""A letter that is called the answer; no word that goes on behind it, as in "the answer is a dog"."""

BEGINS = re.compile(r"[\W_]*([A-Za-z])(?:[\W_]*$|[^\S\n]*\n|[*_\"']*[).:,\]])")
"""A letter by itself, or set off from what follows it."""

SEVERAL = re.compile(r"(^[\W_]*)?\b([A-Z])[\W_]*(?:and|or|[&,/\n])[\W_]*(?!\2)[A-Z]\b[\W_]*(?(1)|$)")
"""Letters in a row, none of which is chosen: an answer begins or ends by them."""

DENIED = re.compile(r"(?:\b(?:not|nor|neither)\b|n't\b)(?:(?!\bbut\b)[^.,;:!?\n])*", re.I)
"""What an answer says not to be so, to the end of the clause."""

ENDS = re.compile(r"\b([A-Z])[\W_]*$")
"""A letter that an answer comes to, as in "I think it is A."."""

LABEL = re.compile(r"\s*\(?([A-Z])[).:]\s*")
"""The letter in front of an option's text."""


def choice(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses among options, given by their texts; None where it says none, or several.

    By what is clearest: a letter that the answer is, or begins by; one that it calls its answer, the last time it does;
    one in brackets; the text of an option; a capital at its end, or within it, though there no word of English. What
    is denied is not looked at, unless options deny something themselves.
    """
    letters = ascii_uppercase[: len(options)]
    if not any(DENIED.search(option) for option in options):
        answer = DENIED.sub("", answer)
    if SEVERAL.search(answer):
        return None
    if found := BEGINS.match(answer):
        return _among(found[1], letters)
    if named := NAMED.findall(answer):
        return _among(named[-1], letters)
    if bracketed := re.findall(r"\(([A-Z])\)", answer):
        return _only({letter for letter in bracketed if letter in letters})
    if said := _option_said(answer, options):
        return said
    if last := ENDS.search(answer):
        return _among(last[1], letters)
    capitals = set(re.findall(r"\b([A-Z])\b(?!')", answer)) - {"A", "I"}
    return _only({letter for letter in capitals if letter in letters})


def bare(option: str) -> str:
    """An option's text without its letter, as in "(A) a dog"."""
    found = LABEL.match(option)
    return option[found.end() :] if found else option.strip()


def labelled(option: str, letter: str) -> bool:
    """Whether an option has its letter already, by the original's test: anywhere in it."""
    return any(f"{letter}{mark}" in option.upper() for mark in "):.")


def upstream_text(answer: str) -> str:
    """What stands behind the first of LEADS that is there, else all of an answer."""
    for lead in LEADS:
        if (at := answer.lower().find(lead)) >= 0:
            return answer[at + len(lead) :].strip()
    return answer.strip()


def upstream_choice(answer: str, options: Sequence[str]) -> str | None:
    """The letter that the original Mantis reads: the first letter in the answer, whatever word it is of.

    "The second" is T, and "A cat" is A. Where there are not so many options, the one whose text, to the letter, is all
    that was said (TIGER-AI-Lab/Mantis, mantis/benchmark/eval.py at 3356142).
    """
    text = upstream_text(answer)
    named = re.match(r"Answer: ([A-Z])", text)
    found = named[1] if named else next((sign.upper() for sign in text if sign.isalpha()), None)
    if found in set(ascii_uppercase[: len(options)]):
        return found
    said = answer.strip()
    same = [letter for letter, option in zip(ascii_uppercase, options, strict=False) if option.strip() == said]
    return same[0] if same else None


def _among(letter: str, letters: str) -> str | None:
    return letter.upper() if letter.upper() in letters else None


def _only(found: set[str]) -> str | None:
    return found.pop() if len(found) == 1 else None


def _option_said(answer: str, options: Sequence[str]) -> str | None:
    """The one option whose words are all of the answer or of its first clause, or are in it and in no longer one.

    An option that is a letter is no words.
    """
    texts = {letter: _words(option) for letter, option in zip(ascii_uppercase, options, strict=False)}
    texts = {letter: text for letter, text in texts.items() if text and not (len(text) == 1 and text.isalpha())}
    said = _words(answer)
    for part in (said, _words(re.split(r"[.,;:!\n]", answer.strip(), maxsplit=1)[0])):
        if whole := [letter for letter, text in texts.items() if text == part]:
            return whole[0] if len(whole) == 1 else None
    within = {letter: text for letter, text in texts.items() if f" {text} " in f" {said} "}
    longest = {
        letter
        for letter, text in within.items()
        if not any(text != other and f" {text} " in f" {other} " for other in within.values())
    }
    return _only(longest)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))
