"""Where metrics go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from miles.core.config import Config


class Tracker(Protocol):
    """``miles.trackers`` entry points name a class constructed with ``(config, run_dir)``."""

    def __init__(self, config: Config, run_dir: Path) -> None: ...

    def log(self, metrics: dict[str, float], *, step: int, kind: str) -> None:
        """Record metrics.  ``kind`` is ``rollout``, ``train`` or ``eval``; ``step`` counts in that kind's own unit."""

    def close(self) -> None:
        """Flush and release."""
