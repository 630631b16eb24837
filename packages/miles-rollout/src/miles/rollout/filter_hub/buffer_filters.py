"""Buffer filters: which groups leave the buffer first."""

from __future__ import annotations

from typing import Any

from miles.core.types.sample import Group


def pop_first(args: Any, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
    """Take groups from the front of the buffer."""
    taken = buffer[:num_samples]
    del buffer[: len(taken)]
    return taken
