"""``format``: is the response ``<think>reasoning</think>`` and then an answer?  1 or 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.rewards.grader import Grader
from miles.rewards.verdict import Verdict, right_or_wrong

_OPEN, _CLOSE = "<think>", "</think>"


def grade(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict:
    """One pair of tags, nothing before it, something in it and after it.

    The opening tag may be missing: chat templates often put it at the end of the prompt.
    """
    thoughts, closed, answer = response.strip().removeprefix(_OPEN).partition(_CLOSE)
    tidy = _OPEN not in thoughts and _OPEN not in answer and _CLOSE not in answer
    return right_or_wrong(bool(closed) and tidy and bool(thoughts.strip()) and bool(answer.strip()))


reward = Grader("format", grade, quick=grade)
