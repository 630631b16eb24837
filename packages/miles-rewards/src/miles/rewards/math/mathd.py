"""First comparison: the string normalization of the MATH benchmark.

Two answers that are equal after it are the same text but for spelling: spacing, ``\\dfrac`` for ``\\frac``, braces that
LaTeX lets one leave out, degrees, currency, percent signs, a trailing unit.
"""

from __future__ import annotations

import re
from functools import lru_cache

REMEMBERED_CHARS = 300
_WHOLE_TEXT = re.compile(r"\\text\{(.+?)\}", re.DOTALL)
_REMOVED = re.compile(r"\n|\\!|\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$|\\%|%")
_TALL_FRACTION = re.compile(r"\\[td]frac")
_BARE_DECIMAL = re.compile(r"(?<![\d.])\.(?=\d)")
_ROOT_WITHOUT_BRACES = re.compile(r"\\sqrt(?![{\[])(\\[a-zA-Z]+|.)")
_ONE = r"(\\[a-zA-Z]+|[^{\\])"
_FRACTION_WITHOUT_BRACES = re.compile(rf"\\frac(?:{_ONE}(\{{|\\[a-zA-Z]+|[^{{\\])|(\{{[^{{}}]*\}}){_ONE})")
_SLASHED = re.compile(r"(-?\d+)/(-?\d+)")


def normalize(text: str) -> str:
    """The canonical spelling of ``text``."""
    return _remembered(text) if len(text) <= REMEMBERED_CHARS else _normalize(text)


def _normalize(text: str) -> str:
    text = text.strip()
    if whole := _WHOLE_TEXT.fullmatch(text):
        text = whole.group(1).strip()
    text = _REMOVED.sub("", text.replace("\\\\", "\\"))
    text = _TALL_FRACTION.sub(r"\\frac", text)
    text = _without_unit(text)
    text = _BARE_DECIMAL.sub("0.", text)
    text = _without_name(text)
    text = _ROOT_WITHOUT_BRACES.sub(r"\\sqrt{\1}", text).replace(" ", "")
    text = _FRACTION_WITHOUT_BRACES.sub(_braced, text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return _SLASHED.sub(r"\\frac{\1}{\2}", text) if _SLASHED.fullmatch(text) else text


_remembered = lru_cache(maxsize=4096)(_normalize)  # labels, and answers that many samples of a group give


def _without_unit(text: str) -> str:
    """``10\\text{ units}`` is 10: a text that starts with a space and ends the answer is a unit."""
    head, unit, tail = text.partition("\\text{ ")
    return head if unit and "\\text{ " not in tail else text


def _without_name(text: str) -> str:
    """``x = 5`` is 5."""
    name, equals, value = text.partition("=")
    return value if equals and "=" not in value and len(name) <= 2 else text


def _braced(match: re.Match[str]) -> str:
    above, below, braced_above, below_braced = match.groups()
    if braced_above:
        return f"\\frac{braced_above}{{{below_braced}}}"
    return f"\\frac{{{above}}}{{" if below == "{" else f"\\frac{{{above}}}{{{below}}}"
