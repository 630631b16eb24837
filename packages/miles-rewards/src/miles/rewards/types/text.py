"""What several types do with responses and labels."""

from __future__ import annotations

from typing import Any

THINK_END = "</think>"


def after_thinking(response: str) -> str:
    """What follows the last ``</think>``; all of a response without one."""
    return response.rpartition(THINK_END)[2]


def labels(label: Any) -> list[str]:
    """The acceptable answers of a label, which may be a list of them.  Empty ones do not count."""
    entries = label if isinstance(label, (list, tuple)) else [label]
    texts = [str(entry).strip() for entry in entries if entry is not None]
    return [text for text in texts if text]
