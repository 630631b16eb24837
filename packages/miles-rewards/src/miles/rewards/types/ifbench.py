"""``ifbench``: does the response follow the instructions that a program can check?  1 when it follows all, else 0.

IFBench (arXiv:2507.02833) and IFEval (arXiv:2311.07911), strict.  Metadata: ``instruction_id_list`` and ``kwargs``, a
list of arguments for each instruction or one mapping for all.  ``partial`` true: the share of instructions followed.

Needs ``miles-rewards[ifbench]``.  Nothing is downloaded and nothing is drawn at random: an instruction without its
arguments, or one that nobody knows, is a fault of the data (``bad_label``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.rewards.grader import Grader
from miles.rewards.types.text import after_thinking
from miles.rewards.verdict import Verdict


def grade(response: str, label: Any, metadata: Mapping[str, Any]) -> Verdict:
    """Check every instruction."""
    from miles.rewards.instructions import CHECKS  # its word lists and tokenizers, in workers only

    names = list(metadata.get("instruction_id_list") or ())
    if not names or any(name not in CHECKS for name in names):
        return Verdict(0.0, "bad_label")
    text = after_thinking(response)
    if not text.strip():
        return Verdict(0.0, "no_answer")
    arguments = _arguments(metadata.get("kwargs"), len(names))
    try:
        followed = [bool(CHECKS[name](text, **given)) for name, given in zip(names, arguments, strict=True)]
    except (TypeError, ValueError, KeyError, AttributeError):
        return Verdict(0.0, "bad_label")
    if metadata.get("partial"):
        share = sum(followed) / len(followed)
        return Verdict(share, "correct" if share == 1 else "wrong" if share == 0 else "partly")
    return Verdict(1.0, "correct") if all(followed) else Verdict(0.0, "wrong")


def _arguments(kwargs: Any, count: int) -> list[dict[str, Any]]:
    """Arguments of each instruction without empty ones; one mapping serves all, the last of a short list the rest."""
    given: Sequence[Mapping[str, Any]] = [kwargs] if isinstance(kwargs, Mapping) else list(kwargs or [{}])
    padded = [*given, *[given[-1]] * (count - len(given))][:count]
    return [{name: value for name, value in (one or {}).items() if value is not None} for one in padded]


reward = Grader(
    "ifbench",
    grade,
    reads=("instruction_id_list", "kwargs", "partial"),
    preload=("miles.rewards.instructions", "nltk", "emoji", "langdetect", "syllapy"),
    extra="ifbench",
    timeout_s=5.0,
)
