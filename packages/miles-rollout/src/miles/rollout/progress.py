"""How far a rollout or an evaluation has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Progress:
    """Samples that were begun and that are finished.  Changed by the event loop, read by anyone."""

    begun: int = 0
    finished: int = 0

    def text(self) -> str | None:
        """``180/256 samples``; None before anything was begun."""
        return f"{self.finished}/{self.begun} samples" if self.begun else None
