"""Counts and latencies of gradings."""

from __future__ import annotations

from collections import Counter

from miles.core.protocols.reward import RewardOutcome


class Ledger:
    """What was graded since the last report."""

    def __init__(self, prefix: str) -> None:
        """``prefix`` begins the names of all metrics, as in ``rollout/reward``."""
        self._prefix = prefix
        self._categories: list[str] = []
        self._num_failed = 0
        self._seconds: list[float] = []

    def add(self, outcome: RewardOutcome) -> None:
        self._categories.append(outcome.category)
        self._seconds.append(outcome.seconds)
        if outcome.failed:
            self._num_failed += 1

    def report(self) -> dict[str, float]:
        """Count, share of failures, share of each category, and percentiles of seconds; then start anew."""
        total = len(self._seconds)
        if not total:
            return {}
        seconds = sorted(self._seconds)
        metrics = {"count": float(total), "failed": self._num_failed / total}
        metrics |= {f"category/{name}": count / total for name, count in sorted(Counter(self._categories).items())}
        metrics |= {
            f"seconds_{name}": seconds[min(total - 1, int(share * total))]
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
        }
        self._categories, self._seconds, self._num_failed = [], [], 0
        return {f"{self._prefix}/{name}": value for name, value in metrics.items()}
