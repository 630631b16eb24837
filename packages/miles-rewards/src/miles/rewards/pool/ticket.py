"""A call on its way through the pool, and where its result goes."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterable
from typing import Protocol

from miles.rewards.pool.job import Job, Result


class Sink(Protocol):
    """Takes results from the pool's thread."""

    def put(self, ticket: Ticket, result: Result) -> None:
        """Note a result."""

    def flush(self) -> None:
        """Hand over what was noted."""


class Ticket:
    """One call.  Touched by the pool's thread only, except ``cancelled``."""

    __slots__ = ("arguments", "cancelled", "future", "index", "job", "retried", "sink", "timeout_s")

    def __init__(self, job: Job, arguments: bytes, timeout_s: float, sink: Sink, index: int = 0) -> None:
        self.job = job
        self.arguments = arguments
        self.timeout_s = timeout_s
        self.sink = sink
        self.index = index
        self.future: asyncio.Future[Result] | None = None
        self.cancelled = False
        self.retried = False


class LoopSink:
    """Results for one event loop: one wake-up of the loop for all that arrived together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # the pool keeps the sink as long as the loop lives
        self._arrived: list[tuple[asyncio.Future[Result], Result]] = []

    def put(self, ticket: Ticket, result: Result) -> None:
        if ticket.future is not None:
            self._arrived.append((ticket.future, result))

    def flush(self) -> None:
        arrived, self._arrived = self._arrived, []
        loop = self._loop()
        if arrived and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_resolve, arrived)


def _resolve(arrived: Iterable[tuple[asyncio.Future[Result], Result]]) -> None:
    for future, result in arrived:
        if not future.done():
            future.set_result(result)


class ListSink:
    """Results for a thread that waits for all of them."""

    def __init__(self, size: int) -> None:
        self.results: list[Result | None] = [None] * size
        self._missing = size
        self._complete = threading.Event()
        if not size:
            self._complete.set()

    def put(self, ticket: Ticket, result: Result) -> None:
        self.results[ticket.index] = result
        self._missing -= 1

    def flush(self) -> None:
        if not self._missing:
            self._complete.set()

    def wait(self) -> list[Result]:
        self._complete.wait()
        return [result for result in self.results if result is not None]
