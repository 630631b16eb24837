"""What a check is."""

from __future__ import annotations

from collections.abc import Callable

Check = Callable[..., bool]
"""``(response, **arguments)``: whether the response follows the instruction.  An argument that is missing or of the
wrong kind raises TypeError or ValueError."""


def compare(count: int, relation: str, threshold: float) -> bool:
    """``count`` is ``less than`` or ``at least`` the threshold."""
    if relation == "less than":
        return count < threshold
    if relation == "at least":
        return count >= threshold
    raise ValueError(f"the relation is {relation!r}; it must be 'less than' or 'at least'")
