"""``dapo``: does the final ``Answer: ...`` line hold the right answer?  ``{"score": 1 or -1, "acc", "pred"}``.

DAPO (arXiv:2503.14476): the last ``Answer:`` within the last 300 characters, both sides normalized as Minerva does
(arXiv:2206.14858, appendix D), then equality of strings.  ``metadata["strict_box_verify"]`` takes the last box within
the last 100 characters instead, and compares it as it stands.

A label that is an integer as text (``42``, ``42.0``) is compared as one; other labels stay as they are.
``strict_upstream`` restores ``int(float(label))``, which fails on labels that are no numbers and cuts 42.7 to 42.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from miles.rewards.grader import Grader
from miles.rewards.math.boxed import last_boxed
from miles.rewards.math.plain import as_integer
from miles.rewards.types.text import labels
from miles.rewards.verdict import Verdict

_TAIL_CHARS = 300
_STRICT_TAIL_CHARS = 100
_QUICK_CHARS = 1000
_NO_ANSWER = "[INVALID]"
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

# Minerva's normalization.  The order matters: later rules act on what earlier ones leave.
_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
_UNITS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples",
)  # fmt: skip
_REMOVED = (
    *_UNITS,
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}"),
    *("^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots", "<|im_end|>", "<|endoftext|>"),
)
_IN_DOLLARS = re.compile(r"^.*?\$(.*?)\$.*$", re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|textbf|overline)\{(.*?)\}")
_BOXED = re.compile(r"\\boxed\{(.*)\}")
_FRACTION = re.compile(r"frac([^{])(.)")
_ROOT = re.compile(r"sqrt([^{])")


def grade(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict:
    """Compare the final answer with the label."""
    truths = labels(label)
    if not truths:
        return _verdict(False, _NO_ANSWER, "bad_label")
    if metadata.get("strict_box_verify"):
        answer = last_boxed(response[-_STRICT_TAIL_CHARS:])
        right = answer in truths
    else:
        matches = _ANSWER.findall(response[-_TAIL_CHARS:])
        answer = normalize(matches[-1]) if matches else None
        right = answer is not None and any(answer == _truth(text, metadata) for text in truths)
    if answer is None:
        return _verdict(False, _NO_ANSWER, "no_answer")
    return _verdict(right, answer, "correct" if right else "wrong")


def quick(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict | None:
    """``grade``, which reads only the end of a response; labels of any sane length."""
    return grade(response, label, metadata) if len(str(label)) <= _QUICK_CHARS else None


def _verdict(right: bool, answer: str, category: str) -> Verdict:
    return Verdict({"score": 1.0 if right else -1.0, "acc": right, "pred": answer}, category)


def _truth(label: str, metadata: Mapping[str, Any]) -> str:
    text = normalize(label)
    return str(int(float(text))) if metadata.get("strict_upstream") else as_integer(text) or text


@lru_cache(maxsize=4096)
def normalize(answer: str) -> str:
    """Minerva's canonical spelling of an answer."""
    answer = answer.rpartition("=")[2]
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for text in _REMOVED:
        answer = answer.replace(text, "")
    answer = _IN_DOLLARS.sub(r"\1", answer)
    answer = _BOXED.sub(r"\1", _WRAPPED.sub(r"\1", answer))
    answer = _ROOT.sub(r"sqrt{\1}", _FRACTION.sub(r"frac{\1}{\2}", answer))
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()


reward = Grader(
    "dapo",
    grade,
    quick=quick,
    reads=("strict_box_verify",),
    failure_score={"score": -1.0, "acc": False, "pred": _NO_ANSWER},
    keys=("score", "acc", "pred"),
    finds_answer=True,
)
