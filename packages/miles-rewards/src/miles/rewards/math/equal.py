"""Whether two answers are equal."""

from __future__ import annotations

import re

from miles.rewards.math import mathd, plain
from miles.rewards.math.expression import NotAnExpression, parse, same

_FRACTION = re.compile(r"-?[0-9]+\.?/0*[1-9][0-9]*\.?")
_RISKY_POWER = re.compile(r"\^\(|\^\d+\^|\^\d\d+")
_NOT_A_LETTER = re.compile(r"sqrt|pi|[\W\d_]")
_BRACKETS = "()[]"
_MAX_LETTERS = 2
_MAX_CHARS = 20_000


def equal(answer: str, label: str, *, loose_thousands: bool = False) -> bool:
    """Whether ``answer`` is ``label``, both in LaTeX or plain mathematics.

    Equal spelling after the normalization of the MATH benchmark, or equality as the PRM800K grader defines it: tuples
    and intervals by element, with the same brackets; fractions must be spelled alike (2/4 is not 1/2); an integer
    equals only integers; other expressions are compared by value, unless they have more than two letters or powers of
    two digits and more.
    """
    spelled = mathd.normalize(answer)
    if spelled and spelled == mathd.normalize(label):
        return True
    if max(len(answer), len(label)) > _MAX_CHARS:
        return False
    try:
        given, truth = plain.normalize(answer, loose_thousands), plain.normalize(label, loose_thousands)
    except ValueError:
        return False
    return bool(given) and (given == truth or _equal_elements(given, truth))


def _equal_elements(given: str, truth: str) -> bool:
    given_elements, truth_elements = _elements(given), _elements(truth)
    if len(given_elements) != len(truth_elements):
        return False
    if len(truth_elements) > 1 and (given[0], given[-1]) != (truth[0], truth[-1]):
        return False
    return all(_equal_element(*pair) for pair in zip(given_elements, truth_elements))


def _elements(text: str) -> list[str]:
    """The elements of a tuple or an interval; anything else is one element."""
    inner = text[1:-1]
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not any(bracket in inner for bracket in _BRACKETS):
        return inner.split(",")
    return [text]


def _equal_element(given: str, truth: str) -> bool:
    if given == truth:
        return True
    if _FRACTION.fullmatch(given) and _FRACTION.fullmatch(truth):
        return False
    given_integer, truth_integer = plain.as_integer(given), plain.as_integer(truth)
    if given_integer is not None or truth_integer is not None:
        return given_integer == truth_integer
    return _comparable(given, truth) and _equal_values(given, truth)


def _comparable(given: str, truth: str) -> bool:
    both = f"{given} {truth}"
    if "**" in both:
        both = both.replace("**", "^")
    return not _RISKY_POWER.search(both) and len(set(_NOT_A_LETTER.sub("", both))) <= _MAX_LETTERS


def _equal_values(given: str, truth: str) -> bool:
    try:
        return same(parse(given), parse(truth))
    except (NotAnExpression, RecursionError):
        return False
