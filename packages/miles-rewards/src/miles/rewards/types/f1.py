"""``f1``: overlap of the words of answer and label, between 0 and 1.

SQuAD's measure (arXiv:1606.05250) with HotpotQA's rule that ``yes``, ``no`` and ``noanswer`` must match exactly: lower
case, no ASCII punctuation, no articles, words as a multiset.  The label may be a list; the best match counts.
Reasoning before the last ``</think>`` and the tags ``<answer>...</answer>`` are left out, except with
``strict_upstream``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

from miles.rewards.grader import Grader
from miles.rewards.types.text import after_thinking
from miles.rewards.verdict import Verdict

_QUICK_CHARS = 5_000
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_ANSWER_OPEN, _ANSWER_CLOSE = "<answer>", "</answer>"
_EXACT = frozenset({"yes", "no", "noanswer"})


def grade(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict:
    """F1 of the response's words against the best label."""
    truths = [str(entry) for entry in (label if isinstance(label, (list, tuple)) else [label]) if entry is not None]
    if not truths:
        return Verdict(0.0, "bad_label")
    answer = normalize(response if metadata.get("strict_upstream") else _answer_part(response))
    return Verdict(max(_f1(answer, normalize(truth)) for truth in truths), "scored")


def quick(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict | None:
    """``grade``, for texts of ordinary length."""
    return grade(response, label, metadata) if len(response) + len(str(label)) <= _QUICK_CHARS else None


def normalize(text: str) -> str:
    """Words in lower case, without punctuation and articles."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _answer_part(response: str) -> str:
    text = after_thinking(response)
    start = text.rfind(_ANSWER_OPEN)
    return text[start + len(_ANSWER_OPEN) :].partition(_ANSWER_CLOSE)[0] if start >= 0 else text


def _f1(answer: str, truth: str) -> float:
    if answer != truth and (answer in _EXACT or truth in _EXACT):
        return 0.0
    answer_words, truth_words = answer.split(), truth.split()
    common = sum((Counter(answer_words) & Counter(truth_words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(answer_words), common / len(truth_words)
    return 2 * precision * recall / (precision + recall)


reward = Grader("f1", grade, quick=quick)
