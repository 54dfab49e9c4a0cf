"""How much of what a description names another names too: objects and actions as words, or as a judge lists them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from nltk.stem.porter import PorterStemmer
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

Synonyms = Mapping[str, Sequence[str]]
"""By word, those that it may stand for."""

TOO_MUCH = "\n"
"""No word of a list: what the original makes of all that it has no more references for."""


class Overlap(NamedTuple):
    """Shares of what is said that is right, of what is right that is said, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def keywords(text: str) -> set[str]:
    """The words of a text that say something, by their stems (Porter 1980): without scikit-learn's English stop words.

    >>> sorted(keywords("The dog's pups were running to a red ball."))
    ['ball', 'dog', 'pup', 'red', 'run']
    """
    stem = PorterStemmer().stem
    return {stem(word) for word in re.findall(r"[a-z]{2,}", text.lower()) if word not in ENGLISH_STOP_WORDS}


def overlap(said: Collection[str], wanted: Collection[str]) -> Overlap:
    """Of two sets.

    >>> overlap({"dog", "ball"}, {"dog", "cat", "house", "ball"})
    Overlap(precision=1.0, recall=0.5, f1=0.6666666666666666)
    """
    hits = len(set(said) & set(wanted))
    if not hits:
        return Overlap(0.0, 0.0, 0.0)
    said_count, wanted_count = len(set(said)), len(set(wanted))
    return Overlap(hits / said_count, hits / wanted_count, 2 * hits / (said_count + wanted_count))


def as_wanted(said: Collection[str], wanted: Collection[str], synonyms: Synonyms) -> set[str]:
    """What is said, each word as the one of those wanted that it is or stands for, if any.

    >>> sorted(as_wanted(["pup", "tree"], ["dog", "ball"], {"pup": ["animal", "dog"]}))
    ['dog', 'tree']
    """
    return {
        word if word in wanted else next((each for each in synonyms.get(word, ()) if each in wanted), word)
        for word in said
    }


def as_upstream(said: Sequence[str], wanted: Sequence[str], synonyms: Synonyms, most: int) -> set[str]:
    """The same as the original does it, one reference after the other, by up to `most` words in a row.

    A reference is taken once, and only by a synonym. Where all are taken, the words left over come to a single one,
    even those that are wanted (TIGER-AI-Lab/Mantis, mantis/benchmark/mementos_eval_utils.py).

    >>> as_upstream(["pup", "dog", "tree"], ["dog"], {"pup": ["dog"]}, 1) == {"dog", TOO_MUCH}
    True
    """
    left, found, at = list(wanted), set[str](), 0
    while at < len(said) and left:
        runs = [said[at : at + length] for length in range(1, min(most, len(said) - at) + 1)]
        runs = [words for words in runs if not any(" " in word for word in words)]
        fits = ((each, len(words)) for each in left for words in runs if each in synonyms.get(" ".join(words), ()))
        word, length = next(fits, (said[at], 0))
        if length:
            left.remove(word)
        found.add(word)
        at += length or 1
    return found | ({TOO_MUCH} if at < len(said) else set())
