"""A pool of killable processes.

Every call has a deadline that starts when a worker starts the call, not when it was queued.  A worker that hangs or
dies is killed and replaced, and only the call in its hands is lost; the rest of its batch goes back to the queue (a
neighbour graded moments before the death may be graded again).  Calls may come from any thread and any event loop.  A
thread of the pool's own talks to the workers and watches the clock: deadlines hold even while an event loop is stuck.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from miles.rewards.pool.calls import Calls, single_block
from miles.rewards.pool.job import Job, Limits
from miles.rewards.pool.keeper import Keeper
from miles.rewards.pool.results import Result, Results
from miles.rewards.pool.ticket import LoopSink, ThreadSink, Ticket


class Pool:
    """Worker processes that call functions by name.

    Starts at its first use; ``close`` (or the end of a ``with`` block) ends the processes.  A process forked from this
    one gets a pool of its own at its first use.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        timeout_s: float = 5.0,
        load_timeout_s: float = 120.0,
        preload: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> None:
        """``num_workers`` None: a quarter of the cores, from 2 to 8.

        ``timeout_s`` is the deadline of a call whose job has none; ``load_timeout_s`` that of importing a job's module;
        ``preload`` are modules to import before the first fork.
        """
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, it is {num_workers}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, it is {timeout_s}")
        self.num_workers = num_workers or min(8, max(2, (os.cpu_count() or 1) // 4))
        self.timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._preload = tuple(preload)
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._keeper: Keeper | None = None
        self._sinks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopSink] = weakref.WeakKeyDictionary()
        _pools.add(self)

    def start(self) -> None:
        """Fork the workers now.  Raises RewardError when they cannot start."""
        self._started().wait_ready()

    async def run(self, job: Job, *arguments: Any, timeout_s: float | None = None) -> Result:
        """Call ``job`` with ``arguments`` in a worker.  Cancelling gives its place in the queue back."""
        try:
            block = single_block(arguments)
        except Exception as error:
            return _unsendable(error)
        return (await self.run_blocks(job, [block], timeout_s=timeout_s))[0]

    async def run_blocks(
        self, job: Job, blocks: Iterable[bytes], *, timeout_s: float | None = None
    ) -> Sequence[Result]:
        """``run_many`` with arguments that ``single_block`` has pickled."""
        calls = Calls()
        for block in blocks:
            calls.add(block)
        return await self._run_all(job, calls, timeout_s)

    async def run_many(
        self, job: Job, items: Iterable[tuple[Any, ...]], *, timeout_s: float | None = None
    ) -> Sequence[Result]:
        """Call ``job`` with each tuple of arguments; the results in order.  Much cheaper than as many ``run``."""
        calls, problems = _pack(items)
        return _merged(await self._run_all(job, calls, timeout_s), problems)

    async def _run_all(self, job: Job, calls: Calls, timeout_s: float | None) -> Results:
        if not calls:
            return Results.pending(0)
        loop = asyncio.get_running_loop()
        ticket = Ticket(job, calls, self._deadline(job, timeout_s), self._sink(loop))
        future: asyncio.Future[Results] = loop.create_future()
        ticket.future = future
        self._started().submit(ticket)
        try:
            return await future
        except asyncio.CancelledError:
            ticket.cancelled = True
            raise

    def map(self, job: Job, items: Iterable[tuple[Any, ...]], timeout_s: float | None = None) -> Sequence[Result]:
        """``run_many`` for threads: blocks, so it is not for event loops."""
        calls, problems = _pack(items)
        if not calls:
            return _merged(Results.pending(0), problems)
        sink = ThreadSink()
        ticket = Ticket(job, calls, self._deadline(job, timeout_s), sink)
        self._started().submit(ticket)
        sink.wait()
        return _merged(ticket.results, problems)

    def close(self) -> None:
        """End all workers; calls still waiting come back as errors.  Safe to call twice."""
        with self._lock:
            keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers and of their parent."""
        keeper = self._keeper
        return keeper.pids if keeper else []

    @property
    def problem(self) -> str:
        """Why the pool gave up; empty while it works or has not started."""
        keeper = self._keeper
        return str(keeper.broken or "") if keeper else ""

    @property
    def num_replaced(self) -> int:
        """Workers that were killed or died, since the start."""
        keeper = self._keeper
        return keeper.num_replaced if keeper else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _started(self) -> Keeper:
        keeper = self._keeper
        if keeper is None:
            with self._lock:
                if self._keeper is None:
                    self._keeper = Keeper(self.num_workers, self._limits, self._preload, self._load_timeout_s)
                keeper = self._keeper
        return keeper

    def _deadline(self, job: Job, timeout_s: float | None) -> float:
        return timeout_s or job.timeout_s or self.timeout_s

    def _sink(self, loop: asyncio.AbstractEventLoop) -> LoopSink:
        sink = self._sinks.get(loop)
        if sink is None:
            sink = self._sinks[loop] = LoopSink(loop)
        return sink

    def _forget(self) -> None:
        """In a forked child: the workers are the parent's."""
        self._lock = threading.Lock()
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.forget()


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _forget_all() -> None:
    for pool in list(_pools):
        pool._forget()


def _close_all() -> None:
    for pool in list(_pools):
        pool.close()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)


def _pack(items: Iterable[tuple[Any, ...]]) -> tuple[Calls, dict[int, Result]]:
    """Pickled arguments, and results in the places of those that cannot be sent."""
    calls = Calls()
    return calls, {place: _unsendable(error) for place, error in calls.pack(items)}


def _merged(results: Results, problems: dict[int, Result]) -> Sequence[Result]:
    if not problems:
        return results
    rest = iter(results)
    return [problems.get(place) or next(rest) for place in range(len(results) + len(problems))]


def _unsendable(error: Exception) -> Result:
    return Result("error", detail=f"the arguments cannot be sent to a worker ({type(error).__name__}: {error})"[:300])
