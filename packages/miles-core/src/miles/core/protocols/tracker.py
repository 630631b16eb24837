"""Where metrics go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    pass


class Tracker(Protocol):
    """``miles.trackers`` entry points name a class constructed with ``(config, run_dir)``.

    ``run_dir / "metrics.jsonl"`` then holds the history of a run that is being continued
    (``miles.core.tracking.jsonl.read_records``).
    """

    def log(self, metrics: Mapping[str, float], *, step: int, kind: str, rollout_id: int) -> None:
        """Record metrics.  ``kind`` is ``rollout``, ``train`` or ``eval``; ``step`` counts in that kind's own unit."""

    def close(self) -> None:
        """Flush and release."""


@runtime_checkable
class StatusTracker(Protocol):
    """A tracker that also shows what the run is waiting for."""

    def waiting(self, for_what: str) -> None:
        """From now on the run waits for this.  Called from another thread as well while that makes progress."""
