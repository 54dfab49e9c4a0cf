"""How much of what a description names another names too: objects and actions as words, or as a judge lists them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from nltk.stem.porter import PorterStemmer
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS


class Overlap(NamedTuple):
    """Shares of what is said that is right, of what is right that is said, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def keywords(text: str) -> set[str]:
    """The words of a text that say something, by their stems (Porter 1980): without scikit-learn's English stop words.

    >>> sorted(keywords("The dogs were running to a red ball."))
    ['ball', 'dog', 'red', 'run']
    """
    stem = PorterStemmer().stem
    return {stem(word) for word in re.findall(r"[a-z]+", text.lower()) if word not in ENGLISH_STOP_WORDS}


def overlap(said: Collection[str], wanted: Collection[str], at_most_one: bool = False) -> Overlap:
    """Of two sets; with `at_most_one`, all that is said too much counts as one, as in the original's code.

    >>> overlap({"dog", "ball"}, {"dog", "cat", "house", "ball"})
    Overlap(precision=1.0, recall=0.5, f1=0.6666666666666666)
    """
    hits, more = len(set(said) & set(wanted)), len(set(said) - set(wanted))
    if at_most_one:
        more = min(more, 1)
    precision = hits / (hits + more) if hits + more else 0.0
    recall = hits / len(set(wanted)) if wanted else 0.0
    return Overlap(precision, recall, 2 * hits / (hits + more + len(set(wanted))) if hits else 0.0)


def alike(words: Collection[str], synonyms: Mapping[str, str]) -> set[str]:
    """Words, each as the one that stands for it and its synonyms."""
    return {synonyms.get(word, word) for word in (each.strip().lower() for each in words) if word}
