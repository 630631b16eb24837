"""``sentence:*``: how sentences grow, and what stands in one of them."""

from __future__ import annotations

import re
from itertools import pairwise

from miles.rewards.instructions.check import Check
from miles.rewards.instructions.text import EDGES, bare, sentences


def alliteration_increment(response: str) -> bool:
    """Each sentence has more words that alliterate with a neighbour than the one before it."""
    return all(before < after for before, after in pairwise(_alliterating(one) for one in sentences(response)))


def increment(response: str, *, small_n: float) -> bool:
    """Each sentence has exactly so many words more than the one before it."""
    lengths = [len(bare(sentence).split()) for sentence in sentences(response)]
    return all(after - before == small_n for before, after in pairwise(lengths))


def keyword(response: str, *, word: str, N: float) -> bool:
    """The Nth sentence has the word."""
    found = sentences(response)
    if len(found) < N:
        return False
    return re.search(rf"\b{re.escape(word)}\b", found[int(N) - 1], re.IGNORECASE) is not None


def _alliterating(sentence: str) -> int:
    """Words in runs of two or more with the same first letter."""
    words = [word for word in (raw.lstrip(EDGES) for raw in sentence.lower().split()) if word]
    same = [a[0] == b[0] for a, b in pairwise(words)]
    begins = sum(1 for place, pair in enumerate(same) if pair and (place == 0 or not same[place - 1]))
    return sum(same) + begins


CHECKS: dict[str, Check] = {
    "sentence:alliteration_increment": alliteration_increment,
    "sentence:increment": increment,
    "sentence:keyword": keyword,
}
