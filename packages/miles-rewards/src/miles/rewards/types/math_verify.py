"""``math_verify``: equality of answers as the math-verify library sees it.  1 or 0.

Needs ``miles-rewards[math-verify]``.  More complete than ``math`` (sets, intervals, equations, answers outside a box),
and much slower.  The library gets the end of what follows the last ``</think>``, and runs without clocks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.rewards.grader import Grader
from miles.rewards.types.text import after_thinking, labels
from miles.rewards.verdict import Verdict, right_or_wrong

_TAIL_CHARS = 4000
_MATH_MARKS = ("\\boxed", "\\(", "\\[")


def grade(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict:
    """Let the library find and compare the answer."""
    from math_verify import parse, verify  # a third of a second to import, in workers only

    truths = labels(label)
    if not truths:
        return Verdict(0.0, "bad_label")
    answer = parse(after_thinking(response)[-_TAIL_CHARS:], parsing_timeout=None)
    if not answer:
        return Verdict(0.0, "no_answer")
    golds = (parse(_boxed(truth), parsing_timeout=None) for truth in truths)
    return right_or_wrong(any(verify(gold, answer, timeout_seconds=None) for gold in golds))


def _boxed(label: str) -> str:
    """The label as the library reads it best: in a box, unless it is marked as mathematics already."""
    if any(mark in label for mark in _MATH_MARKS):
        return label
    return f"\\boxed{{{label.strip('$')}}}"


reward = Grader("math_verify", grade, preload=("math_verify",), extra="math-verify", timeout_s=5.0, finds_answer=True)
