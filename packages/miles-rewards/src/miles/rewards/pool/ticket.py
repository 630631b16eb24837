"""Calls on their way through the pool, and where their results go."""

from __future__ import annotations

import asyncio
import pickle
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import sub
from typing import Any, Protocol

from miles.rewards.pool.job import Job, Result

_PENDING = Result("error", detail="not called yet")


class Sink(Protocol):
    """Takes tickets whose calls have all ended from the pool's thread."""

    def put(self, ticket: Ticket) -> None:
        """Note a complete ticket."""

    def flush(self) -> None:
        """Hand over what was noted."""


class Calls:
    """Arguments of calls: pickled tuples, one behind the other, so that neighbours are sent as they lie there."""

    __slots__ = ("_buffer", "_ends")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ends = [0]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, arguments: bytes) -> None:
        """Put one call last."""
        self._buffer += arguments
        self._ends.append(len(self._buffer))

    def pack(self, items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Exception]]:
        """Put calls with ``items`` last; the places of those that cannot be pickled, and why, as they turn up."""
        buffer, ends, dumps = self._buffer, self._ends, pickle.dumps
        for place, arguments in enumerate(items):
            try:
                buffer += dumps(arguments, 5)
            except Exception as error:
                yield place, error
            else:
                ends.append(len(buffer))

    def part(self, start: int, stop: int) -> tuple[memoryview, list[int]]:
        """Calls ``start`` to ``stop - 1``, and the bytes of each.  No more calls can be added then."""
        ends = self._ends[start : stop + 1]
        return memoryview(self._buffer)[ends[0] : ends[-1]], list(map(sub, ends[1:], ends))


class Ticket:
    """Calls of one function that were asked together.  Touched by the pool's thread only, except ``cancelled``."""

    __slots__ = ("calls", "cancelled", "future", "job", "num_missing", "results", "sink", "timeout_s")

    def __init__(self, job: Job, calls: Calls, timeout_s: float, sink: Sink) -> None:
        self.job = job
        self.calls = calls
        self.timeout_s = timeout_s
        self.sink = sink
        self.results = [_PENDING] * len(calls)
        self.num_missing = len(calls)
        self.future: asyncio.Future[list[Result]] | None = None
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

    def settle(self, results: list[Result]) -> bool:
        """Note the results of its calls; whether the ticket is complete now."""
        self.ticket.results[self.start : self.stop] = results
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
