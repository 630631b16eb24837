"""``gpqa``: did the response choose the right option?  1 or 0.

GPQA (arXiv:2311.12022) with the convention ``Answer: X``.  The letter is looked for after the last ``</think>``, the
surest sign first: ``Answer: X``, a box, ``the answer is X``, ``X is correct``, a response that begins with a letter,
the last capital standing alone; within a sign the last one counts.  Two different letters side by side (``A or B``) are
ambiguous and score 0.  Only where no letter is found, the text of exactly one option in the response counts as its
choice.

Metadata: ``choices`` (list, or mapping of letters), ``valid_letters``, ``correct_letter``, ``correct_answer``.  The
label is a letter, an index from 0, or an option's text.  ``strict_upstream`` matches without word boundaries, takes the
first match and accepts a one-letter label anywhere in the text.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from miles.rewards.grader import Grader
from miles.rewards.types.text import after_thinking
from miles.rewards.verdict import Verdict, right_or_wrong

_DEFAULT_LETTERS = "ABCDEFGHIJ"
_QUICK_OPTIONS_CHARS = 5_000
_TAIL_CHARS = 8_000

_MARKUP = r"(?:\\boxed|\\text|\\mathrm|\\mathbf|\\textbf|[\s*_$({\[`\"']){0,12}"
_LETTER = _MARKUP + r"([A-Z])(?![\w'])"
_ANY_CASE_LETTER = _MARKUP + r"([A-Za-z])(?![\w'])"
_ANSWER_WORD = r"(?:answer|choice|option|réponse|respuesta|antwort|risposta|答案)"
_SIGNS = (
    re.compile(rf"(?i:{_ANSWER_WORD}(?: selected)?)[\s*_]*[:：=]{_ANY_CASE_LETTER}"),
    re.compile(r"\\(?:boxed|fbox)\{" + _LETTER + r"\s*[}\])]*\s*(?:[}:.]|$)"),
    re.compile(
        rf"(?i:{_ANSWER_WORD}[\s*_]*(?:is|est|ist|es|è|是)(?:\s+(?:definitely|clearly|thus|therefore|option))?)[:：]?{_LETTER}"
    ),
    re.compile(r"\b([A-Z])(?![\w'])[*_)\]}$]{0,4}\s{1,4}is\s{1,4}(?:the\s{1,4})?(?:correct|right|answer)"),
    re.compile(r"\A\W*([A-Z])(?=\s*(?:[.:,;)\]。，、]|\Z|[^\W\d_A-Za-z]))"),
)
_STANDING_ALONE = re.compile(r"(?<![\w'\\])([A-Z])(?![\w'])(?!\s+[a-z]{2})")
_STATED_LETTER = re.compile(r"\([A-Z]\)|\A[A-Z][.:)]")
_ALTERNATIVE = re.compile(r"[\s*_$)}\]]{0,12}(?:/|,|&|\band\b|\bor\b)\s*" + _MARKUP + r"([A-Z])(?![\w'])")
_SPACES = re.compile(r"[\W_]+")

_UPSTREAM_SIGNS = (
    re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*([A-Z])", re.IGNORECASE),
    re.compile(r"([A-Z])\s*is\s*(?:the\s*)?correct", re.IGNORECASE),
    re.compile(r"final\s*(?:answer|option)\s*(?:is|:)?\s*([A-Z])", re.IGNORECASE),
)


def grade(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict:
    """Compare the chosen letter with the correct one."""
    letters = _valid_letters(metadata)
    truth = _correct_letter(label, metadata, letters)
    texts = _option_texts(metadata)
    if truth is None and not _text(label) and not _text(metadata.get("correct_answer")):
        return Verdict(0.0, "bad_label")
    text = after_thinking(response)[-_TAIL_CHARS:]
    if metadata.get("strict_upstream"):
        return _grade_upstream(text, truth, label, letters)
    chosen = _chosen_letter(text, letters)
    if chosen == "":
        return Verdict(0.0, "ambiguous")
    if chosen is not None and truth is not None:
        return right_or_wrong(chosen == truth)
    return _grade_by_text(text, truth, label, metadata, texts)


def quick(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict | None:
    """``grade``, which reads only the end of a response; options of any sane length."""
    return grade(response, label, metadata) if len(str(metadata)) <= _QUICK_OPTIONS_CHARS else None


def _chosen_letter(text: str, letters: str) -> str | None:
    """The chosen letter; an empty string when two are, None when none is."""
    for sign in (*_SIGNS, _STANDING_ALONE):
        matches = [match for match in sign.finditer(text) if match[1].upper() in letters]
        if matches:
            letter: str = matches[-1][1].upper()
            alternative = None if sign is _STANDING_ALONE else _ALTERNATIVE.match(text, matches[-1].end(1))
            return letter if alternative is None or alternative[1] == letter else ""
    return None


def _valid_letters(metadata: Mapping[str, Any]) -> str:
    if letters := metadata.get("valid_letters"):
        return "".join(str(letter).upper() for letter in letters)
    choices = metadata.get("choices")
    if isinstance(choices, Mapping) and choices:
        return "".join(str(letter).upper() for letter in choices)
    return string.ascii_uppercase[: len(choices)] if choices else _DEFAULT_LETTERS


def _option_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Normalized text of each option, by letter."""
    choices = metadata.get("choices") or {}
    pairs = choices.items() if isinstance(choices, Mapping) else zip(string.ascii_uppercase, choices)
    return {str(letter).upper(): _text(option) for letter, option in pairs}


def _correct_letter(label: Any, metadata: Mapping[str, Any], letters: str) -> str | None:
    if letter := metadata.get("correct_letter"):
        return str(letter).upper()
    if isinstance(label, int) and not isinstance(label, bool):
        return letters[label] if 0 <= label < len(letters) else None
    text = str(label or "").strip()
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    if same := [letter for letter, option in _option_texts(metadata).items() if option and option == _text(text)]:
        return same[0]
    stated = _STATED_LETTER.search(text)
    return stated[0].strip("().:") if stated else None


def _grade_by_text(
    text: str, truth: str | None, label: Any, metadata: Mapping[str, Any], texts: Mapping[str, str]
) -> Verdict:
    response = f" {_text(text)} "
    named = [letter for letter, option in texts.items() if len(option) > 1 and f" {option} " in response]
    if len(named) > 1:
        return Verdict(0.0, "ambiguous")
    if named and truth is not None:
        return right_or_wrong(named[0] == truth)
    wanted = [_text(metadata.get("correct_answer")), _text(label) if not isinstance(label, int) else ""]
    if not texts and any(len(option) > 1 and f" {option} " in response for option in wanted):
        return right_or_wrong(True)
    return Verdict(0.0, "no_answer")


def _grade_upstream(text: str, truth: str | None, label: Any, letters: str) -> Verdict:
    found = (sign.search(text) for sign in _UPSTREAM_SIGNS)
    chosen = next((match.group(1).upper() for match in found if match and match.group(1).upper() in letters), None)
    alone = [letter for letter in re.findall(r"\b([A-Z])\b", text) if letter in letters]
    chosen = chosen or (alone[-1] if alone else None)
    if chosen is not None and truth is not None:
        return right_or_wrong(chosen == truth)
    wanted = _text(label)
    return right_or_wrong(bool(wanted) and wanted in _text(text))


def _text(value: Any) -> str:
    """Lower case, words separated by single spaces."""
    return "" if value is None else _SPACES.sub(" ", str(value).lower()).strip()


reward = Grader(
    "gpqa",
    grade,
    quick=quick,
    reads=("choices", "valid_letters", "correct_letter", "correct_answer"),
)
