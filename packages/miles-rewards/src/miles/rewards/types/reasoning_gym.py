"""``reasoning_gym``: the verifier of the reasoning-gym task that a sample comes from.  A number between 0 and 1.

Needs ``miles-rewards[reasoning-gym]``.  The task is named by ``metadata["dataset"]`` or ``metadata["source_dataset"]``
(where the library puts it); its entry is ``metadata["entry"]`` or made of the label (the answer) and the metadata.  The
model's answer is what follows the last ``</think>``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from miles.rewards.grader import Grader
from miles.rewards.types.text import after_thinking
from miles.rewards.verdict import Verdict

_Score = Callable[[str, dict[str, Any]], float]


def grade(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict:
    """Ask the task's own verifier."""
    entry = dict(metadata.get("entry") or _entry(label, metadata))
    dataset = metadata.get("dataset") or entry.get("metadata", {}).get("source_dataset")
    if dataset is None:
        return Verdict(0.0, "bad_label")
    answer = after_thinking(response).strip()
    if not answer:
        return Verdict(0.0, "no_answer")
    score = float(_verifier(str(dataset))(answer, entry))
    return Verdict(score, "correct" if score >= 1 else "wrong" if score <= 0 else "partly")


def _entry(label: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": metadata.get("question", ""), "answer": label, "metadata": dict(metadata)}


@cache
def _verifier(dataset: str) -> _Score:
    import reasoning_gym  # a second to import, in workers only

    verifier: _Score = reasoning_gym.get_score_answer_fn(dataset)
    return verifier


reward = Grader("reasoning_gym", grade, reads=None, preload=("reasoning_gym",), extra="reasoning-gym", timeout_s=5.0)
