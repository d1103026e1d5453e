"""How near two texts are, from 0 to 1: by letters (fuzzy match) and by words (ROUGE, GLEU).

Idea: what two texts have in common, as a share of both. Words are small letters and digits; a text without words is
near nothing.
Equation: fuzzy match: 2 LCS / (a + b) over letters; ROUGE-n: F1 of n-grams; ROUGE-L: F1 of the longest common
subsequence of words; GLEU: min(precision, recall) of all n-grams of 1 to 4 words
Source: Lin, ACL 2004 (ROUGE, aclanthology.org/W04-1013); Wu et al., arXiv 1609.08144 (GLEU, section 4.3); Hyyrö, Nordic
Journal of Computing 2004 (the longest common subsequence by bits); the ratio of rapidfuzz.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Final


def fuzzy_match(one: str, two: str) -> float:
    """The share of letters that both have in this order; two empty texts are one."""
    return 2 * _common(one, two) / (len(one) + len(two)) if one or two else 1.0


def rouge(one: str, two: str, *, size: int) -> float:
    """F1 of the n-grams of `size` words."""
    mine, theirs = (_grams(_words(text), size) for text in (one, two))
    return _f1(sum((mine & theirs).values()), sum(mine.values()), sum(theirs.values()))


def rouge_l(one: str, two: str) -> float:
    """F1 of the longest common subsequence of words."""
    mine, theirs = _words(one), _words(two)
    return _f1(_common(mine, theirs), len(mine), len(theirs))


def gleu(one: str, two: str) -> float:
    """The share of n-grams of up to four words that both have, of those of the one that has more."""
    mine, theirs = (sum((_grams(_words(text), size) for size in range(1, 5)), Counter()) for text in (one, two))
    most = max(sum(mine.values()), sum(theirs.values()))
    return sum((mine & theirs).values()) / most if most else 0.0


SIMILARITIES: Final[Mapping[str, Callable[[str, str], float]]] = {
    "fuzzy_match": fuzzy_match,
    "gleu": gleu,
    **{f"rouge_{size}": partial(rouge, size=size) for size in range(1, 6)},
    "rouge_l": rouge_l,
}


def _common(one: Sequence[Hashable], two: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence: a row of the table is one number, whose bits are its steps."""
    places: dict[Hashable, int] = {}
    for at, item in enumerate(one):
        places[item] = places.get(item, 0) | 1 << at
    every = (1 << len(one)) - 1
    row = every
    for item in two:
        kept = row & places.get(item, 0)
        row = ((row + kept) | (row - kept)) & every
    return len(one) - row.bit_count()


def _f1(common: int, mine: int, theirs: int) -> float:
    return 2 * common / (mine + theirs) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _grams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))
