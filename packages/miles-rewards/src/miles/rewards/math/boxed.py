"""The content of ``\\boxed{...}``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_BOX = "\\boxed"
_OPEN = "\\boxed{"
_BRACE = re.compile(r"[{}]")


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` of ``text``; None without one or when its braces do not balance."""
    start = text.rfind(_BOX)
    if start < 0 or not text.startswith(_OPEN, start):
        return None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start + len(_OPEN) : brace.start()]
    return None


def has_box(text: str) -> bool:
    """Whether a box was begun at all, well formed or not."""
    return _BOX in text


def grade_content(grade: Callable[..., Any], response: str, label: Any, metadata: Mapping[str, Any]) -> Any:
    """``grade`` what stands in the last box."""
    return grade(last_boxed(response) or "", label, metadata)
