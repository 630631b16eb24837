"""What graders return, and how it becomes an outcome."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from miles.core.protocols.reward import RewardOutcome, Score

FAILURES = frozenset({"timeout", "crash", "error", "bad_label", "bad_score", "too_long", "remote_error"})
"""Categories in which no verdict was reached.  All others are verdicts, ``no_answer`` and ``unparsable`` included:
there the model's answer is at fault, and the reward of a wrong answer is due."""


class Verdict(NamedTuple):
    """A reward and the kind of verdict it stands for."""

    score: Score
    category: str


# One object each: workers send an answer that many calls give only once.
_RIGHT, _WRONG = Verdict(1.0, "correct"), Verdict(0.0, "wrong")

_new = tuple.__new__  # a third of the time of RewardOutcome(...)


def right_or_wrong(right: bool) -> Verdict:
    """1 or 0."""
    return _RIGHT if right else _WRONG


def read_verdict(returned: Any) -> Verdict:
    """The verdict in what a grader or a user's function returned: a number, a mapping, or a (score, category) pair.

    Raises ValueError for anything that cannot be a reward, not-a-number included.
    """
    if isinstance(returned, (list, tuple)) and len(returned) == 2 and isinstance(returned[1], str):
        return Verdict(_score(returned[0]), returned[1])
    return Verdict(_score(returned), "scored")


def _score(value: Any) -> Score:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if isinstance(entry, (int, float)) and not _is_finite(entry):
                raise ValueError(f"the reward's entry {key!r} is {entry}")
        return dict(value)
    if not isinstance(value, (int, float)):
        raise ValueError(f"the reward is a {type(value).__name__}; it must be a number or a mapping")
    if not _is_finite(value):
        raise ValueError(f"the reward is {value}")
    return float(value)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond all floats
        return False


def entry_of(score: Mapping[str, Any], key: str) -> float | None:
    """The number at ``key``; None when there is none."""
    try:
        number = float(score[key])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def outcome_of(returned: Any, seconds: float, failure_score: Score) -> RewardOutcome:
    """The outcome of a call that returned."""
    if returned.__class__ is Verdict:  # the common case: this runs for every sample
        score, category = returned
        if score.__class__ is float and category not in FAILURES and math.isfinite(score):
            return _new(RewardOutcome, (score, category, "", seconds, False, False, None))
    try:
        score, category = read_verdict(returned)
    except ValueError as error:
        return failed("bad_score", str(error)[:300], failure_score, seconds)
    if category in FAILURES:
        return failed(category, category.replace("_", " "), score, seconds)
    return RewardOutcome(score, category, seconds=seconds)


def failed(category: str, detail: str, failure_score: Score, seconds: float = 0.0) -> RewardOutcome:
    """The outcome of a call that came to no verdict."""
    return RewardOutcome(failure_score, category, detail, seconds, failed=True)
