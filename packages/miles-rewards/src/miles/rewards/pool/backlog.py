"""Calls that wait for a worker, and how many of them make a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from miles.rewards.pool.calls import BLOCK_BYTES
from miles.rewards.pool.progress import TRAY_BYTES
from miles.rewards.pool.ticket import Span

_BATCH_S = 0.2
"""Expected work in one batch: long enough to make messages cheap, short enough to balance."""
_MAX_BATCH = 16384
_BATCH_BYTES = TRAY_BYTES - BLOCK_BYTES
"""A batch that is longer by its last block still fits a worker's tray."""
_UNKNOWN_COST_S = 0.005
_LEAST_COST_S = 1e-6


class Backlog:
    """Spans of calls in the order in which they are due, and what a call of each function takes."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque()
        self._num_calls = 0
        self._costs: dict[int, float] = {}

    def __len__(self) -> int:
        """The number of calls."""
        return self._num_calls

    def add(self, spans: Iterable[Span]) -> None:
        """Put ``spans`` last."""
        for span in spans:
            self._spans.append(span)
            self._num_calls += span.size

    def put_back(self, spans: Sequence[Span]) -> None:
        """Put ``spans`` first."""
        self._spans.extendleft(reversed(spans))
        self._num_calls += sum(span.size for span in spans)

    def take(self, share: int) -> list[Span]:
        """The next calls: at most ``share``, about ``_BATCH_S`` of work.  A call that killed a worker goes alone."""
        batch: list[Span] = []
        room, room_s, room_bytes = min(share, _MAX_BATCH), _BATCH_S, _BATCH_BYTES
        while self._spans and room and ((room_s > 0 and room_bytes > 0) or not batch):
            if self._spans[0].retried and batch:
                break
            span = self._next(room, room_s, room_bytes)
            if span.ticket.cancelled:
                continue
            batch.append(span)
            room -= span.size
            room_s -= span.size * self._cost(span)
            room_bytes -= span.ticket.calls.num_bytes(span.start, span.stop)
            if span.retried:
                break
        return batch

    def _next(self, room: int, room_s: float, room_bytes: int) -> Span:
        span = self._spans.popleft()
        fitting = min(
            span.size,
            room,
            int(room_s / self._cost(span)) + 1,
            span.ticket.calls.num_fitting(span.start, room_bytes),
        )
        if fitting < span.size and not span.ticket.cancelled:
            self._spans.appendleft(span.part(fitting, span.size))
            span = span.part(0, fitting)
        self._num_calls -= span.size
        return span

    def _cost(self, span: Span) -> float:
        return self._costs.get(span.ticket.job.key, _UNKNOWN_COST_S)

    def learn(self, span: Span, seconds: float) -> None:
        """Remember what the calls of ``span`` took together."""
        key, mean = span.ticket.job.key, max(_LEAST_COST_S, seconds / span.size)
        known = self._costs.get(key)
        if known is None:
            self._costs[key] = mean
            return
        mean = min(mean, 10 * known + 0.001)  # one slow call must not make batches tiny
        self._costs[key] = known + 0.3 * (mean - known)
