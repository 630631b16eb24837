"""``words:*``: what the words of a response are made of, and how they follow each other."""

from __future__ import annotations

import string
from collections import Counter
from itertools import pairwise

from miles.rewards.instructions import lexicon
from miles.rewards.instructions.check import Check
from miles.rewards.instructions.text import EDGES, bare, bare_words, sentences, tokens, word_tokens

_VOWELS = frozenset("aeiou")
_CONSONANTS = frozenset(string.ascii_lowercase) - _VOWELS
_PALINDROMES, _PALINDROME_LENGTH = 10, 5
_LONGEST_WORD = 100


def alphabet(response: str) -> bool:
    """Each word begins with the letter after that of the word before it; ``a`` follows ``z``."""
    words = bare_words(response)
    if not words or words[0][0] not in string.ascii_lowercase:
        return False
    first = string.ascii_lowercase.index(words[0][0])
    return all(word[0] == string.ascii_lowercase[(first + place) % 26] for place, word in enumerate(words))


def vowel(response: str) -> bool:
    """One paragraph with at most three different vowels."""
    text = response.strip().lower()
    return "\n" not in text and len(set(text) & _VOWELS) <= 3


def consonants(response: str) -> bool:
    """Every word has two consonants side by side."""
    return all(
        any(a in _CONSONANTS and b in _CONSONANTS for a, b in pairwise(word)) for word in response.lower().split()
    )


def palindrome(response: str) -> bool:
    """Ten palindromes of five letters or more."""
    words = bare_words(response)
    return sum(1 for word in words if len(word) >= _PALINDROME_LENGTH and word == word[::-1]) >= _PALINDROMES


def prime_lengths(response: str) -> bool:
    """Every word's length is a prime number."""
    return all(_is_prime(len(word)) for word in bare(response).split())


def start_verb(response: str) -> bool:
    """The first word is a verb: the benchmark asks a tagger, we a list of common verbs and their forms."""
    words = tokens(response)
    return bool(words) and lexicon.is_verb(words[0].lower())


def repeats(response: str, *, small_n: float) -> bool:
    """No word more often than so many times."""
    return all(count <= small_n for count in Counter(bare_words(response)).values())


def odd_even_syllables(response: str) -> bool:
    """Words of odd and of even numbers of syllables take turns."""
    import syllapy  # reads a dictionary, in workers only

    parities = [syllapy.count(word) % 2 for word in bare_words(response)]
    return all(a != b for a, b in pairwise(parities))


def last_first(response: str) -> bool:
    """The last word of a sentence is the first of the next."""
    for this, following in pairwise(sentences(response)):
        last, first = this.rstrip(EDGES).split(), following.lstrip(EDGES).split()
        if not last or not first or last[-1].lower() != first[0].lower():
            return False
    return True


def paragraph_last_first(response: str) -> bool:
    """Each line ends with the word that it begins with."""
    lines = (line.lower().strip().strip(EDGES).split() for line in response.split("\n"))
    return all(words[0] == words[-1] for words in lines if words)


def no_consecutive(response: str) -> bool:
    """Neighbouring words begin differently."""
    return all(a[0] != b[0] for a, b in pairwise(bare_words(response)))


def keywords_specific_position(response: str, *, keyword: str, n: float, m: float) -> bool:
    """The mth word of the nth sentence is the keyword."""
    found = sentences(response)
    if len(found) < n:
        return False
    words = word_tokens(found[int(n) - 1])
    return len(words) >= m and words[int(m) - 1].lower() == keyword.strip().lower()


def words_position(response: str, *, keyword: str) -> bool:
    """The second and the last but one word are the keyword."""
    words = [word.lower() for word in word_tokens(response)]
    return len(words) > 1 and words[1] == words[-2] == keyword.strip().lower()


def _is_prime(number: int) -> bool:
    return 1 < number < _LONGEST_WORD and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


CHECKS: dict[str, Check] = {
    "words:alphabet": alphabet,
    "words:vowel": vowel,
    "words:consonants": consonants,
    "words:palindrome": palindrome,
    "words:prime_lengths": prime_lengths,
    "words:start_verb": start_verb,
    "words:repeats": repeats,
    "words:odd_even_syllables": odd_even_syllables,
    "words:last_first": last_first,
    "words:paragraph_last_first": paragraph_last_first,
    "words:no_consecutive": no_consecutive,
    "words:keywords_specific_position": keywords_specific_position,
    "words:words_position": words_position,
}
