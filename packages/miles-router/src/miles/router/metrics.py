"""What is counted, and its Prometheus text."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from miles.router.workers import Worker, WorkerState

_DURATION_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class Metrics:
    """Counters of one router.  ``received`` equals the sum of the outcomes plus the requests under way."""

    def __init__(self) -> None:
        self.received = 0
        self.answered = 0  # the client got a worker's whole answer
        self.cut = 0  # the answer broke off, and so did the client's connection
        self.cancelled = 0  # the client left first
        self.refusals: Counter[int] = Counter()  # errors answered by the router itself, by status
        self.retries = 0
        self.durations = [0] * (len(_DURATION_BOUNDS_S) + 1)
        self.duration_sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Add the duration of one request."""
        self.durations[bisect_left(_DURATION_BOUNDS_S, duration_s)] += 1
        self.duration_sum_s += duration_s

    def refused(self, status: int) -> None:
        """Count an error answered by the router."""
        self.refusals[status] += 1

    @property
    def outcomes(self) -> dict[str, int]:
        """How requests ended; each ends in one way."""
        return {
            "answered": self.answered,
            "refused": self.refusals.total(),
            "cut": self.cut,
            "cancelled": self.cancelled,
        }

    @property
    def under_way(self) -> int:
        """Requests that have begun and not ended."""
        return self.received - sum(self.outcomes.values())


def prometheus_text(metrics: Metrics, workers: Iterable[Worker], waiting: int) -> str:
    """Everything in the Prometheus text format, version 0.0.4."""
    workers = list(workers)
    lines = [*_request_lines(metrics), *_worker_lines(workers)]
    lines += _family("queue_length", "gauge", "Requests that wait for a worker", [("", waiting)])
    return "\n".join(lines) + "\n"


def _request_lines(metrics: Metrics) -> Iterator[str]:
    yield from _family("requests_received_total", "counter", "Requests that arrived", [("", metrics.received)])
    outcomes = [(f'outcome="{outcome}"', count) for outcome, count in metrics.outcomes.items()]
    yield from _family("requests_total", "counter", "Requests that ended, by outcome", outcomes)
    yield from _family("requests_under_way", "gauge", "Requests that have not ended", [("", metrics.under_way)])
    refusals = [(f'status="{status}"', count) for status, count in sorted(metrics.refusals.items())]
    yield from _family("refusals_total", "counter", "Errors answered by the router itself", refusals)
    yield from _family("retries_total", "counter", "Requests sent again", [("", metrics.retries)])
    name = "miles_router_request_duration_seconds"
    yield f"# HELP {name} Time from a request's head to the end of its answer"
    yield f"# TYPE {name} histogram"
    total = 0
    for bound, count in zip((*map(str, _DURATION_BOUNDS_S), "+Inf"), metrics.durations):
        total += count
        yield f'{name}_bucket{{le="{bound}"}} {total}'
    yield f"{name}_sum {metrics.duration_sum_s:.6f}"
    yield f"{name}_count {total}"


def _worker_lines(workers: list[Worker]) -> Iterator[str]:
    def label(worker: Worker) -> str:
        return f'worker="{worker.url}"'

    answers = [
        (f'{label(worker)},status="{hundreds}xx"', worker.statuses[hundreds])
        for worker in workers
        for hundreds in range(2, 6)
    ]
    yield from _family("worker_answers_total", "counter", "Answers passed on, by status", answers)
    failures = [
        (f'{label(worker)},kind="{kind}"', count)
        for worker in workers
        for kind, count in sorted(worker.failures.items())
    ]
    yield from _family("worker_failures_total", "counter", "Attempts without a usable answer", failures)
    in_flight = [(label(worker), worker.in_flight) for worker in workers]
    yield from _family("worker_in_flight", "gauge", "Requests at the worker", in_flight)
    idle = [(label(worker), len(worker.idle)) for worker in workers]
    yield from _family("worker_idle_connections", "gauge", "Open connections without a request", idle)
    states = [
        (f'{label(worker)},state="{state}"', int(worker.state is state)) for worker in workers for state in WorkerState
    ]
    yield from _family("worker_state", "gauge", "1 for the state the worker is in", states)


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP miles_router_{name} {text}"
    yield f"# TYPE miles_router_{name} {kind}"
    for labels, value in samples:
        yield f"miles_router_{name}{'{' + labels + '}' if labels else ''} {value}"
