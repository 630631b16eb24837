"""Second comparison, first half: LaTeX or plain mathematics -> a plain expression such as ``(x+1)/2``.

The rules are those of the PRM800K grader: units, currency and percent signs go, ``2 million`` becomes a product, mixed
numbers become sums, thousands separators go, everything is lower case.
"""

from __future__ import annotations

import re
from functools import lru_cache

from miles.rewards.math.latex import to_plain
from miles.rewards.math.mathd import REMEMBERED_CHARS

_WHOLE_TEXT = re.compile(r"\\text\{(.+?)\}", re.DOTALL)
_MONEY_AND_PERCENT = re.compile(r"\\?[$%]")
_CONJUNCTION = re.compile(r" (?:or|and) ")
_MAGNITUDES = {"million": "*10^6", "billion": "*10^9", "trillion": "*10^12"}
_MAGNITUDE = re.compile("|".join(_MAGNITUDES))
_UNIT = re.compile(
    r"(?:degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(?:es)?s?"
    r" *(?:\^(?:\d+|\{\d+\}))?"
)
_DEGREES = re.compile(r"\^ *(?:\\circ|\{ *\\circ *\})")
_SPACED_THOUSANDS = re.compile(r"(?:,\\!|\{,\}) *")
_MINUS = re.compile(r"- +")
_MIXED = re.compile(r"(-?)(?<![\d./])(\d+) +(\d+/\d+)")
_LOOSE_THOUSANDS = re.compile(r"(?<=\d), *(?=\d{3}(?:\D|$))")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_NUMBER = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d{1,3}))?")
_WORDY = re.compile(r"[a-zA-Z\\$%^{,]| \d")
_MAX_SCALE = 300


def normalize(text: str, loose_thousands: bool = False) -> str:
    """``text`` as a plain expression.

    ``loose_thousands`` takes ``32, 349`` for a number, as the original grader does.  Raises ValueError when the LaTeX
    is nested too deeply to be an answer.
    """
    return (_remembered if len(text) <= REMEMBERED_CHARS else _normalize)(text, loose_thousands)


def _normalize(text: str, loose_thousands: bool) -> str:
    text = text.strip()
    if _WORDY.search(text):
        text = _without_words(text)
        text = _SPACED_THOUSANDS.sub("", text)
    text = as_integer(text.strip()) or text
    if "\\" in text or "{" in text:
        text = to_plain(text)
    text = _MIXED.sub(_mixed, _MINUS.sub("-", text))
    if loose_thousands:
        text = _LOOSE_THOUSANDS.sub("", text)
    text = _THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)
    text = text.replace(" ", "").lower()
    return as_integer(text) or text


_remembered = lru_cache(maxsize=4096)(_normalize)


def _without_words(text: str) -> str:
    if whole := _WHOLE_TEXT.fullmatch(text):
        text = whole.group(1)
    text = _MONEY_AND_PERCENT.sub("", text)
    text = _CONJUNCTION.sub(" , ", text)
    text = _MAGNITUDE.sub(lambda word: _MAGNITUDES[word.group()], text)
    text = _DEGREES.sub("", _UNIT.sub("", text)).strip()
    return text[1:-1] if text.startswith("{") and text.endswith("}") else text


def _mixed(match: re.Match[str]) -> str:
    sign, whole, fraction = match.groups()
    return f"-({whole}+{fraction})" if sign else f"{whole}+{fraction}"


def as_integer(text: str) -> str | None:
    """The digits of a number that is an integer (``042``, ``42.0``, ``4.2e1``); None for anything else.

    Works on the text: a literal of ten thousand digits costs nothing.
    """
    number = _NUMBER.fullmatch(text)
    if number is None or not (number[2] or number[3]):
        return None
    sign, whole, decimals, scale = number[1], number[2], number[3] or "", int(number[4] or 0)
    if abs(scale) > _MAX_SCALE:
        return None
    digits = whole + decimals
    point = len(whole) + scale
    digits, rest = digits[: max(point, 0)].ljust(point, "0"), digits[max(point, 0) :]
    if rest.strip("0"):
        return None
    digits = digits.lstrip("0") or "0"
    if not digits.isascii():
        digits = "".join(str(int(digit)) for digit in digits)
    return f"-{digits}" if sign == "-" and digits != "0" else digits
