"""``math``: is the content of the last box the right answer?  1 or 0.

The contract is that of the PRM800K grader (arXiv:2305.20050) on the last ``\\boxed{}``: see ``miles.rewards.math``.
The label may be a list of acceptable answers.  ``strict_upstream`` takes ``32, 349`` for 32349 and the label 0 for
none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.rewards.grader import Grader
from miles.rewards.math.boxed import has_box, last_boxed
from miles.rewards.math.equal import equal
from miles.rewards.types.text import labels
from miles.rewards.verdict import Verdict, right_or_wrong

_QUICK_CHARS = 300
"""Longer answers go to a worker: the time of comparing two is bounded, but grows with their length."""

_NO_BOX, _BROKEN_BOX = Verdict(0.0, "no_answer"), Verdict(0.0, "unparsable")


def grade(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict:
    """Compare the last box with the label."""
    truths = truths_of(label, metadata)
    if not truths:
        return Verdict(0.0, "bad_label")
    answer = last_boxed(response)
    return missing_box(response) if answer is None else compare(answer, truths, metadata)


def quick(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict | None:
    """``grade``, for answers of ordinary length."""
    truths = truths_of(label, metadata)
    answer = last_boxed(response)
    if answer is None or not truths:
        return Verdict(0.0, "bad_label") if not truths else missing_box(response)
    if len(truths) > 4 or len(answer) > _QUICK_CHARS or max(map(len, truths)) > _QUICK_CHARS:
        return None
    return compare(answer, truths, metadata)


def truths_of(label: Any, metadata: Mapping[str, Any]) -> list[str]:
    """Acceptable answers, without the boxes they may stand in."""
    if metadata.get("strict_upstream") and not label:
        return []
    boxes = [(text, last_boxed(text)) for text in labels(label)]
    return [text if content is None else content for text, content in boxes if content != ""]


def missing_box(response: str) -> Verdict:
    """The verdict on a response without a box, or with a broken one."""
    return _BROKEN_BOX if has_box(response) else _NO_BOX


def compare(answer: str, truths: list[str], metadata: Mapping[str, Any]) -> Verdict:
    """Whether ``answer`` equals one of ``truths``."""
    loose = bool(metadata.get("strict_upstream"))
    return right_or_wrong(any(equal(answer, truth, loose_thousands=loose) for truth in truths))


reward = Grader("math", grade, quick=quick, finds_answer=True)
