"""How the benchmarks cut text into sentences and words.

They use NLTK's Punkt and Treebank tokenizers.  Punkt runs here on a list of abbreviations instead of its trained data,
which would have to be downloaded.
"""

from __future__ import annotations

import re
import string
from functools import cache
from typing import TYPE_CHECKING

from miles.rewards.instructions import lexicon

if TYPE_CHECKING:
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

EDGES = string.punctuation + " "
"""What may surround a word."""

_WORD = re.compile(r"\w+")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def sentences(text: str) -> list[str]:
    """Sentences, without the space between them."""
    found: list[str] = _punkt().tokenize(text)
    return found


def tokens(text: str) -> list[str]:
    """Words, punctuation marks and parts of contractions, as the Penn Treebank has them."""
    words = _treebank()
    return [token for sentence in sentences(text) for token in words.tokenize(sentence)]


def word_tokens(text: str) -> list[str]:
    """``tokens`` that hold a letter or a digit."""
    return [token for token in tokens(text) if any(character.isalnum() for character in token)]


def runs(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return _WORD.findall(text)


def bare(text: str) -> str:
    """The text without punctuation."""
    return text.translate(_WITHOUT_PUNCTUATION)


def bare_words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return bare(text.lower()).split()


@cache
def _punkt() -> PunktSentenceTokenizer:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer  # a quarter of a second, in workers only

    parameters = PunktParameters()
    parameters.abbrev_types = set(lexicon.words("abbreviations"))
    return PunktSentenceTokenizer(parameters)


@cache
def _treebank() -> NLTKWordTokenizer:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()
