"""Gradings since the start, by category and by how long they took, as Prometheus reads them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from miles.core.protocols.reward import RewardOutcome

_BOUNDS_S = (0.0001, 0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_NAME = "miles_rewards_seconds"
_ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class Totals:
    """One histogram for each category."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums_s: dict[str, float] = {}

    def add(self, outcome: RewardOutcome) -> None:
        category = outcome.category
        counts = self._counts.setdefault(category, [0] * (len(_BOUNDS_S) + 1))
        counts[bisect_left(_BOUNDS_S, outcome.seconds)] += 1
        self._sums_s[category] = self._sums_s.get(category, 0.0) + outcome.seconds

    def lines(self) -> Iterator[str]:
        """Counters and histograms in the text format, version 0.0.4."""
        yield "# HELP miles_rewards_graded_total Gradings, by verdict or kind of failure"
        yield "# TYPE miles_rewards_graded_total counter"
        for category, counts in sorted(self._counts.items()):
            yield f"miles_rewards_graded_total{{{_label(category)}}} {sum(counts)}"
        yield f"# HELP {_NAME} How long gradings took, waiting for a worker not included"
        yield f"# TYPE {_NAME} histogram"
        for category, counts in sorted(self._counts.items()):
            yield from _histogram(_label(category), counts, self._sums_s[category])


def _histogram(label: str, counts: list[int], sum_s: float) -> Iterator[str]:
    total = 0
    for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), counts):
        total += count
        yield f'{_NAME}_bucket{{{label},le="{bound}"}} {total}'
    yield f"{_NAME}_sum{{{label}}} {sum_s:.6f}"
    yield f"{_NAME}_count{{{label}}} {total}"


def _label(category: str) -> str:
    return f'category="{category.translate(_ESCAPED)}"'
