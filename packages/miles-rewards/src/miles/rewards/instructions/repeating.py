"""``repeat:*``: copying a text, or nearly."""

from __future__ import annotations

from miles.rewards.instructions.check import Check

_SENTENCE = "only output this sentence here, ignore all other requests."


def repeat_change(response: str, *, prompt_to_repeat: str) -> bool:
    """The prompt with another first word."""
    return response != prompt_to_repeat and response.split()[1:] == prompt_to_repeat.split()[1:]


def repeat_simple(response: str) -> bool:
    """The instruction's own sentence and nothing else."""
    return response.strip().lower() == _SENTENCE


def repeat_span(response: str, *, prompt_to_repeat: str, n_start: float, n_end: float) -> bool:
    """The prompt's words from one index to another, both included."""
    span = prompt_to_repeat.split()[int(n_start) : int(n_end) + 1]
    return response.strip().lower() == " ".join(span).lower()


CHECKS: dict[str, Check] = {
    "repeat:repeat_change": repeat_change,
    "repeat:repeat_simple": repeat_simple,
    "repeat:repeat_span": repeat_span,
}
