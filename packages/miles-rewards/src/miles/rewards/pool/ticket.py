"""Calls on their way through the pool, and where their results go."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from miles.rewards.pool.calls import Calls
from miles.rewards.pool.job import Job
from miles.rewards.pool.results import Results


class Sink(Protocol):
    """Takes tickets whose calls have all ended from the pool's thread."""

    def put(self, ticket: Ticket) -> None:
        """Note a complete ticket."""

    def flush(self) -> None:
        """Hand over what was noted."""


class Ticket:
    """Calls of one function that were asked together.  Touched by the pool's thread only, except ``cancelled``."""

    __slots__ = ("__weakref__", "calls", "cancelled", "future", "job", "num_missing", "results", "sink", "timeout_s")

    def __init__(self, job: Job, calls: Calls, timeout_s: float, sink: Sink) -> None:
        self.job = job
        self.calls = calls
        self.timeout_s = timeout_s
        self.sink = sink
        self.results = Results.pending(len(calls))
        self.num_missing = len(calls)
        self.future: asyncio.Future[Results] | None = None
        self.cancelled = False


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring calls of a ticket: numbers ``start`` to ``stop - 1``."""

    ticket: Ticket
    start: int
    stop: int
    retried: bool = False
    """Whether it is one call that killed a worker before."""

    @property
    def size(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Span:
        """Calls ``start`` to ``stop - 1``, counted from the span's own first."""
        return Span(self.ticket, self.start + start, self.start + stop, self.retried)

    def settle(self, results: Results) -> bool:
        """Note the results of its calls; whether the ticket is complete now."""
        self.ticket.results.put(self.start, results)
        self.ticket.num_missing -= len(results)
        return not self.ticket.num_missing


def whole(ticket: Ticket) -> Span:
    """All calls of a ticket."""
    return Span(ticket, 0, len(ticket.calls))


class LoopSink:
    """Results for one event loop: one wake-up of the loop for all that arrived together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # the pool keeps the sink as long as the loop lives
        self._arrived: list[Ticket] = []

    def put(self, ticket: Ticket) -> None:
        self._arrived.append(ticket)

    def flush(self) -> None:
        arrived, self._arrived = self._arrived, []
        loop = self._loop()
        if arrived and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_resolve, arrived)


def _resolve(arrived: Iterable[Ticket]) -> None:
    for ticket in arrived:
        if ticket.future is not None and not ticket.future.done():
            ticket.future.set_result(ticket.results)


class ThreadSink:
    """Tells a thread that waits for one ticket."""

    def __init__(self) -> None:
        self._complete = threading.Event()
        self._noted = False

    def put(self, ticket: Ticket) -> None:
        self._noted = True

    def flush(self) -> None:
        if self._noted:
            self._complete.set()

    def wait(self) -> None:
        """Return when the ticket is complete: the pool settles every call, at its deadline at the latest."""
        self._complete.wait()
