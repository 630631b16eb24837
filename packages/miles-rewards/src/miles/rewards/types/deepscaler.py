"""``deepscaler``: as ``math``, on what follows the reasoning only.  1 or 0.

The answer is looked for after the last ``</think>``, or else between the first and the second ``###Response``; a
response with neither scores 0 (DeepScaleR, agentica-project).  ``strict_upstream`` refuses lists of labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.rewards.grader import Grader
from miles.rewards.types import math
from miles.rewards.types.text import THINK_END, after_thinking
from miles.rewards.verdict import Verdict

_RESPONSE = "###Response"


def grade(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict:
    """Compare the last box of the answer part with the label."""
    return _refusal(response, label, metadata) or math.grade(_answer_part(response), label, metadata)


def quick(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict | None:
    """``grade``, for answers of ordinary length."""
    return _refusal(response, label, metadata) or math.quick(_answer_part(response), label, metadata)


def _refusal(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict | None:
    if metadata.get("strict_upstream") and isinstance(label, (list, tuple)):
        return Verdict(0.0, "bad_label")
    if THINK_END not in response and _RESPONSE not in response:
        return Verdict(0.0, "unclosed_thinking" if "<think>" in response else "no_answer")
    return None


def _answer_part(response: str) -> str:
    return after_thinking(response) if THINK_END in response else response.split(_RESPONSE)[1]


reward = Grader("deepscaler", grade, quick=quick, finds_answer=True)
