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
        self._seconds: list[float] = []
        self._failures: dict[str, list[float]] = {}
        """Seconds of failed gradings, by category."""

    def add(self, outcome: RewardOutcome) -> None:
        self._categories.append(outcome.category)
        self._seconds.append(outcome.seconds)
        if outcome.failed:
            self._failures.setdefault(outcome.category, []).append(outcome.seconds)

    def report(self) -> dict[str, float]:
        """Count, share of failures, share of each category, and percentiles of seconds; then start anew.

        Each kind of failure has percentiles of its own.
        """
        total = len(self._seconds)
        if not total:
            return {}
        metrics = {"count": float(total), "failed": sum(map(len, self._failures.values())) / total}
        metrics |= {f"category/{name}": count / total for name, count in sorted(Counter(self._categories).items())}
        metrics |= _percentiles("seconds", self._seconds)
        for name, seconds in sorted(self._failures.items()):
            metrics |= _percentiles(f"{name}_seconds", seconds)
        self._categories, self._seconds, self._failures = [], [], {}
        return {f"{self._prefix}/{name}": value for name, value in metrics.items()}


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    ordered, total = sorted(seconds), len(seconds)
    shares = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    return {f"{name}_{part}": ordered[min(total - 1, int(share * total))] for part, share in shares}
