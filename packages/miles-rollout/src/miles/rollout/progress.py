"""How far a rollout or an evaluation has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Progress:
    """Samples that were begun and that are finished.  Changed by the event loop, read by anyone."""

    begun: int = 0
    finished: int = 0
    retried: int = 0
    """Generations that failed and were begun again."""
    resumed: int = 0
    """Responses that an engine cut unasked and that were gone on with."""

    def collect(self) -> dict[str, float]:
        """How often samples had to be helped on since the last call, where they had to."""
        counts = {"rollout/retried_samples": self.retried, "rollout/resumed_samples": self.resumed}
        self.retried = self.resumed = 0
        return {name: count for name, count in counts.items() if count}

    def text(self) -> str | None:
        """``180/256 samples``; None before anything was begun."""
        return f"{self.finished}/{self.begun} samples" if self.begun else None
