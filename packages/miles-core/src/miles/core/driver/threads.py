"""How many CPU threads a role gets."""

from __future__ import annotations

import os


def train_threads(requested: int, ranks_on_node: int) -> int:
    """Threads of one trainer rank: ``requested``, or an equal share of this machine's cores when it is 0."""
    return requested or max(1, (os.cpu_count() or 1) // ranks_on_node)
