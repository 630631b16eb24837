"""Word lists of the checks: the files of ``words``."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

CONJUNCTIONS = frozenset({"and", "but", "for", "nor", "or", "so", "yet"})
"""The coordinating ones."""


@cache
def words(name: str) -> list[str]:
    """The words of a list, in the order of its file.

    ``person_names`` is what the benchmark's prompt shows to the model, ``stop_words`` what NLTK's corpus has of
    English, ``capitals`` those of Europe north of 45 degrees from north to south.
    """
    return files(__package__).joinpath("words", f"{name}.txt").read_text().split()


@cache
def word_set(name: str) -> frozenset[str]:
    """``words``, to look into."""
    return frozenset(words(name))


def is_verb(word: str) -> bool:
    """Whether a word in small letters is a form of a common English verb."""
    return word in _verb_forms()


@cache
def _verb_forms() -> frozenset[str]:
    return word_set("irregular_verbs").union(*(_regular_forms(verb) for verb in words("verbs")))


def _regular_forms(verb: str) -> set[str]:
    """The verb with ``-s``, ``-ed`` and ``-ing``, the last letter doubled or dropped as spelling has it, or not."""
    if verb.endswith("e"):
        return {verb, f"{verb}s", f"{verb}d", f"{verb[:-1]}ing"}
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return {verb, f"{verb[:-1]}ies", f"{verb[:-1]}ied", f"{verb}ing"}
    plural = f"{verb}es" if verb.endswith(("s", "sh", "ch", "x", "z", "o")) else f"{verb}s"
    forms = {verb, plural, f"{verb}ed", f"{verb}ing"}
    if verb[-1] in "bdglmnprt" and verb[-2] in "aeiou":
        forms |= {f"{verb}{verb[-1]}ed", f"{verb}{verb[-1]}ing"}
    return forms
