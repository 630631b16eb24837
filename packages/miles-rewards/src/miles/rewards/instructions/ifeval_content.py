"""IFEval (arXiv:2311.07911): words that must or must not occur, and lengths."""

from __future__ import annotations

import re
from collections.abc import Sequence

from miles.rewards.instructions.check import Check, compare
from miles.rewards.instructions.text import runs, sentences

_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_PLACEHOLDER = re.compile(r"\[.*?\]")
_MARKERS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
_FIRST_WORD = re.compile(r"[^.,?!'\"\s]*")


def existence(response: str, *, keywords: Sequence[str]) -> bool:
    """All keywords occur."""
    return all(re.search(re.escape(keyword), response, re.IGNORECASE) for keyword in keywords)


def frequency(response: str, *, keyword: str, frequency: float, relation: str) -> bool:
    """The keyword occurs less than, or at least, so many times."""
    found = re.findall(re.escape(keyword.strip()), response, re.IGNORECASE)
    return compare(len(found), relation, frequency)


def forbidden_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, *, letter: str, let_frequency: float, let_relation: str) -> bool:
    """The letter occurs less than, or at least, so many times."""
    return compare(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


def number_sentences(response: str, *, num_sentences: float, relation: str) -> bool:
    """Less than, or at least, so many sentences."""
    return compare(len(sentences(response)), relation, num_sentences)


def number_words(response: str, *, num_words: float, relation: str) -> bool:
    """Less than, or at least, so many words."""
    return compare(len(runs(response)), relation, num_words)


def number_paragraphs(response: str, *, num_paragraphs: float) -> bool:
    """So many paragraphs with ``***`` between them; only the first and the last part may be empty."""
    parts = [part.strip() for part in _DIVIDER.split(response)]
    if not all(parts[1:-1]):
        return False
    return sum(1 for part in parts if part) == num_paragraphs


def nth_paragraph_first_word(response: str, *, num_paragraphs: float, nth_paragraph: float, first_word: str) -> bool:
    """So many paragraphs with an empty line between them, and one of them begins with the word."""
    parts = [part.strip() for part in response.split("\n\n")]
    filled = sum(1 for part in parts if part)
    if filled != num_paragraphs or nth_paragraph > filled:
        return False
    paragraph = parts[int(nth_paragraph) - 1].lstrip("'").lstrip('"')
    found = _FIRST_WORD.match(paragraph.lower())
    return found is not None and found[0] == first_word.lower()


def number_placeholders(response: str, *, num_placeholders: float) -> bool:
    """At least so many placeholders like ``[address]``."""
    return len(_PLACEHOLDER.findall(response)) >= num_placeholders


def postscript(response: str, *, postscript_marker: str) -> bool:
    """A postscript."""
    marker = postscript_marker.strip()
    return re.search(_MARKERS.get(marker, re.escape(marker.lower())), response.lower()) is not None


CHECKS: dict[str, Check] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
}
