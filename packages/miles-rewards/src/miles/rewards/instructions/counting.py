"""``count:*`` and ``ratio:*``: how much of something a response holds."""

from __future__ import annotations

import re

from miles.rewards.instructions import lexicon
from miles.rewards.instructions.check import Check
from miles.rewards.instructions.text import EDGES, bare, runs, sentences, tokens

_DIGITS = re.compile(r"\d+")
_JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
_TIMES = (1, 2, 3, 5, 7)
_MARKS = frozenset(".,!?;:")
_TOLERANCE = 2.0


def word_count_range(response: str, *, min_words: float, max_words: float) -> bool:
    """Between so many and so many words."""
    return min_words <= len(runs(response)) <= max_words


def unique_word_count(response: str, *, N: float) -> bool:
    """At least N different words."""
    return len({word.strip(EDGES) for word in response.lower().split()}) >= N


def conjunctions(response: str, *, small_n: float) -> bool:
    """At least so many different coordinating conjunctions.  Forms written differently count apart, as in IFBench."""
    found = {word for word in response.split() if word.strip(EDGES).lower() in lexicon.CONJUNCTIONS}
    return len(found) >= small_n


def person_names(response: str, *, N: float) -> bool:
    """At least N names of the benchmark's list."""
    return sum(1 for name in lexicon.words("person_names") if re.search(rf"\b{name}\b", response)) >= N


def numbers(response: str, *, N: float) -> bool:
    """Exactly N numbers; ``1,234.5`` is one."""
    return len(_DIGITS.findall(bare(response))) == N


def pronouns(response: str, *, N: float) -> bool:
    """At least N pronouns; of ``she/her`` each counts."""
    words = tokens(response.replace("/", " ").lower())
    return sum(1 for word in words if word in lexicon.word_set("pronouns")) >= N


def punctuation(response: str) -> bool:
    """Every standard mark, and an interrobang besides."""
    for interrobang in ("?!", "!?", "\u203d"):
        if interrobang in response:
            return set(response.replace(interrobang, "", 1)) >= _MARKS
    return False


def words_japanese(response: str, *, N: float) -> bool:
    """Every Nth word is Japanese, unless it is a number."""
    every = int(N)
    words = (word.strip(EDGES) for word in response.split()[every - 1 :: every])
    return all(_JAPANESE.search(word) for word in words if word and not word.isdigit())


def keywords_multiple(response: str, **keywords: str) -> bool:
    """Five keywords, once, twice, three, five and seven times."""
    wanted = ((keywords[f"keyword{place}"], times) for place, times in enumerate(_TIMES, 1))
    return all(
        len(re.findall(rf"\b{re.escape(keyword.strip())}\b", response, re.IGNORECASE)) == times
        for keyword, times in wanted
    )


def stop_words(response: str, *, percentage: float) -> bool:
    """At most so many of a hundred words are stop words."""
    words = runs(response.lower())
    return bool(words) and 100 * sum(1 for word in words if word in lexicon.word_set("stop_words")) <= percentage * len(
        words
    )


def sentence_type(response: str) -> bool:
    """Two declarative sentences for each question."""
    statements, questions, _ = _ends(response)
    return statements == 2 * questions


def sentence_balance(response: str) -> bool:
    """As many statements as questions as exclamations."""
    statements, questions, exclamations = _ends(response)
    return statements == questions == exclamations


def sentence_words(response: str) -> bool:
    """Three sentences of as many characters each, without a word twice."""
    found = [sentence.strip() for sentence in sentences(response)]
    words = bare(" ".join(found).lower()).split()
    return len(found) == 3 and len({len(sentence) for sentence in found}) == 1 and len(words) == len(set(words))


def overlap(response: str, *, reference_text: str, percentage: float) -> bool:
    """So many of a hundred trigrams occur in the reference, give or take two."""
    own = _trigrams(response)
    if not own:
        return False
    return abs(100 * len(own & _trigrams(reference_text)) / len(own) - percentage) <= _TOLERANCE


def _ends(response: str) -> tuple[int, int, int]:
    """Sentences that end with a full stop, a question mark, an exclamation mark."""
    last = [sentence[-1:] for sentence in sentences(response)]
    return last.count("."), last.count("?"), last.count("!")


def _trigrams(text: str) -> set[tuple[str, str, str]]:
    words = tokens(text)
    return set(zip(words, words[1:], words[2:]))


CHECKS: dict[str, Check] = {
    "count:word_count_range": word_count_range,
    "count:unique_word_count": unique_word_count,
    "count:conjunctions": conjunctions,
    "count:person_names": person_names,
    "count:numbers": numbers,
    "count:pronouns": pronouns,
    "count:punctuation": punctuation,
    "count:words_japanese": words_japanese,
    "count:keywords_multiple": keywords_multiple,
    "ratio:stop_words": stop_words,
    "ratio:sentence_type": sentence_type,
    "ratio:sentence_balance": sentence_balance,
    "ratio:sentence_words": sentence_words,
    "ratio:overlap": overlap,
}
