"""The pool's thread: gives batches to workers, takes their answers, kills the late ones."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from miles.core.errors import RewardError
from miles.rewards.pool.backlog import Backlog
from miles.rewards.pool.job import Limits
from miles.rewards.pool.member import Member
from miles.rewards.pool.nursery import Nursery
from miles.rewards.pool.results import Result, Results, single
from miles.rewards.pool.ticket import Sink, Span, Ticket, whole

_LOG = logging.getLogger(__name__)

_LINGER_S = 0.002
"""A free worker waits this long for company for a lonely call: samples finish in bursts, and a message costs more than
most gradings."""
_MIN_SHARE = 16
"""Calls that go to one worker together though others have nothing to do."""
_PATIENCE_S = 0.1
"""After this long at one call, a worker's other calls go to workers that have nothing to do."""
_RECYCLE_AFTER = 200_000
"""Calls after which a worker is replaced, so that leaks of a grader stay small."""
_MAX_FAILURES_IN_A_ROW = 8
"""Deaths of workers and zygotes without one finished call between them, after which the pool gives up."""


class Keeper:
    """Owner of the zygote and its workers.  Everything but ``submit`` and ``close`` happens on its own thread."""

    def __init__(self, num_workers: int, limits: Limits, preload: Sequence[str], load_timeout_s: float) -> None:
        self.num_replaced = 0
        self._num_workers = num_workers
        self._limits = limits
        self._preload = preload
        self._load_timeout_s = load_timeout_s
        self._arriving: deque[Ticket] = deque()
        self._backlog = Backlog()
        self._queued_since = 0.0
        self._members: list[Member] = []
        self._open: weakref.WeakSet[Ticket] = weakref.WeakSet()
        """Admitted tickets that lack results.  Weak: nobody waits for those that are gone."""
        self._flushing: set[Sink] = set()
        self._failures_in_a_row = 0
        self.broken: RewardError | None = None
        """Why it gave up."""
        self._closing = False
        self._ended = False
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._awake = True
        """Whether the thread will look at ``_arriving`` without being woken."""
        self._bell, self._clapper = socket.socketpair()
        self._bell.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._nursery: Nursery | None = None
        self._thread = threading.Thread(target=self._run, name="miles-rewards-pool", daemon=True)
        self._thread.start()

    # Called from any thread.

    def submit(self, ticket: Ticket) -> None:
        with self._lock:
            accepted = not self._ended
            if accepted:
                self._arriving.append(ticket)
        if accepted:
            self._ring()
        else:
            self._refuse(ticket)

    def wait_ready(self) -> None:
        """Return when the workers are forked.  Raises RewardError when they could not be."""
        self._ready.wait()
        if self.broken is not None:
            raise self.broken

    def close(self) -> None:
        self._closing = True
        self._ring()
        self._thread.join()

    @property
    def pids(self) -> list[int]:
        nursery = self._nursery
        return [*(member.pid for member in self._members), *([nursery.pid] if nursery else [])]

    def forget(self) -> None:
        """In a forked child of this process, where the thread does not exist."""
        self._selector.close()
        self._bell.close()
        self._clapper.close()
        for member in self._members:
            member.sock.close()
        if self._nursery is not None:
            self._nursery.forget()

    def _ring(self) -> None:
        with self._lock:
            if self._awake:
                return
            self._awake = True
        with contextlib.suppress(OSError):
            self._clapper.send(b"!")

    # The thread.

    def _run(self) -> None:
        try:
            self._populate()
            self._ready.set()
            while not self._closing:
                self._turn()
        except RewardError as error:
            self._break(error)
        except Exception as error:
            _LOG.exception("the reward pool broke")
            self._break(RewardError(f"the reward pool broke: {type(error).__name__}: {error}"))
        finally:
            self._tear_down()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._nap()):
            if key.data is not None:
                self._attend(key.data, events)
            elif key.fileobj is self._bell:
                with contextlib.suppress(BlockingIOError):
                    self._bell.recv(4096)
            else:
                self._restart()
                break
        self._admit()
        self._enforce_deadlines()
        self._rebalance()
        self._hand_out()
        self._flush()

    def _nap(self) -> float | None:
        """How long nothing needs doing unless somebody calls."""
        with self._lock:
            self._awake = bool(self._arriving or self._closing)
            if self._awake:
                return 0.0
        now = time.monotonic()
        waits = [member.check_at - now for member in self._members if member.num_open]
        if any(not member.num_open for member in self._members):
            if self._backlog:
                waits.append(self._queued_since + _LINGER_S - now)
            elif any(member.num_open > 1 for member in self._members):
                waits.append(_PATIENCE_S)
        return max(0.0, min(waits)) if waits else None

    def _admit(self) -> None:
        if self._arriving and not self._backlog:
            self._queued_since = time.monotonic()
        while self._arriving:
            self._open.add(self._arriving[0])
            self._backlog.add([whole(self._arriving.popleft())])

    # Answers.

    def _attend(self, member: Member, events: int) -> None:
        if member not in self._members:
            return  # buried earlier in this turn
        try:
            if events & selectors.EVENT_WRITE and member.writer.flush():
                self._selector.modify(member.sock, selectors.EVENT_READ, member)
            answers, returned, alive = member.read() if events & selectors.EVENT_READ else ([], [], True)
        except OSError:
            answers, returned, alive = [], [], False
        self._failures_in_a_row = 0 if answers else self._failures_in_a_row
        self._backlog.put_back(returned)
        for span, results in answers:
            self._backlog.learn(span, results.total_s)
            self._finish(span, results)
        if not alive:
            self._lose(member)
        elif not member.num_open and member.num_done >= _RECYCLE_AFTER:
            self._bury(member)
            self._spawn(member.slot)

    def _finish(self, span: Span, results: Results) -> None:
        if span.settle(results):
            self._open.discard(span.ticket)
            span.ticket.sink.put(span.ticket)
            self._flushing.add(span.ticket.sink)

    def _flush(self) -> None:
        for sink in self._flushing:
            with contextlib.suppress(RuntimeError):  # its event loop was closed meanwhile: nobody waits
                sink.flush()
        self._flushing.clear()

    # Losses.

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for member in list(self._members):
            if member not in self._members or not member.num_open or member.check_at > now:
                continue
            if overdue := member.overdue(now, self._load_timeout_s):
                self._lose(member, overdue)

    def _lose(self, member: Member, overdue: str | None = None) -> None:
        """A worker died, or is late and must die: settle the call in its hands, queue the others again."""
        current, others = member.unanswered()
        self.num_replaced += 1
        self._backlog.put_back(others)
        if current is not None:
            self._settle(current, overdue)
        else:
            self._count_failure("a reward worker died before doing anything")
        self._bury(member)
        self._spawn(member.slot)

    def _settle(self, call: Span, overdue: str | None) -> None:
        if overdue is not None:
            self._finish(call, single(Result("timeout", detail=overdue, seconds=call.ticket.timeout_s)))
        elif call.retried:
            self._finish(call, single(Result("crash", detail="the worker process died twice on this call")))
        else:
            self._backlog.put_back([replace(call, retried=True)])

    def _count_failure(self, what: str) -> None:
        self._failures_in_a_row += 1
        if self._failures_in_a_row > _MAX_FAILURES_IN_A_ROW:
            raise RewardError(f"{what}, {self._failures_in_a_row} times in a row")

    def _bury(self, member: Member) -> None:
        self._members.remove(member)
        self._selector.unregister(member.sock)
        member.sock.close()
        try:
            self._live_nursery().kill(member.pid)
        except OSError:
            self._restart()

    def _spawn(self, slot: int) -> None:
        if any(member.slot == slot for member in self._members):
            return  # a restart has filled it
        try:
            pid, sock = self._live_nursery().fork(slot)
        except OSError:
            self._restart()
            return
        member = Member(slot, pid, sock, self._live_nursery().progress)
        self._members.append(member)
        self._selector.register(sock, selectors.EVENT_READ, member)

    # The zygote.

    def _populate(self) -> None:
        self._nursery = Nursery(self._num_workers, self._limits, self._preload, self._load_timeout_s)
        self._selector.register(self._nursery, selectors.EVENT_READ)
        for slot in range(self._num_workers):
            self._spawn(slot)

    def _restart(self) -> None:
        """The zygote is gone: end its workers and start afresh; nobody is to blame, so every call is queued again."""
        self._count_failure("the parent process of the reward workers died")
        _LOG.warning("the parent process of the reward workers died; starting another")
        for member in self._members:
            current, others = member.unanswered()
            self._backlog.put_back([*([current] if current else []), *others])
        self._disband()
        self._populate()

    def _live_nursery(self) -> Nursery:
        if self._nursery is None:
            raise ConnectionResetError("no zygote")
        return self._nursery

    def _disband(self) -> None:
        for member in self._members:
            self._selector.unregister(member.sock)
            member.sock.close()
        self._members = []
        if self._nursery is not None:
            self._selector.unregister(self._nursery)
            self._nursery.stop()
            self._nursery = None

    # Work.

    def _hand_out(self) -> None:
        idle = [member for member in self._members if not member.num_open]
        if not self._backlog or not idle or self._lingering():
            return
        for member in idle:
            if member in self._members and (batch := self._backlog.take(self._share())):
                self._give(member, batch)

    def _rebalance(self) -> None:
        if self._backlog or all(member.num_open for member in self._members):
            return
        now = time.monotonic()
        for member in self._members:
            if member.num_open > 1:
                self._backlog.add(member.recall(now, _PATIENCE_S))

    def _lingering(self) -> bool:
        few = len(self._backlog) < len(self._members)
        return few and time.monotonic() < self._queued_since + _LINGER_S

    def _share(self) -> int:
        return max(_MIN_SHARE, -(-len(self._backlog) // len(self._members)))

    def _give(self, member: Member, batch: list[Span]) -> None:
        try:
            complete = member.give(batch)
        except OSError:
            self._lose(member)
            return
        if not complete:
            self._selector.modify(member.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, member)

    # The end.

    def _break(self, error: RewardError) -> None:
        self.broken = error
        self._ready.set()

    def _tear_down(self) -> None:
        try:
            self._disband()
        finally:  # whatever broke, and wherever: nobody is left waiting
            with self._lock:
                self._ended = True
            self._flush()
            for ticket in (*self._open, *self._arriving):
                self._refuse(ticket)
            self._selector.close()
            self._bell.close()
            self._clapper.close()

    def _refuse(self, ticket: Ticket) -> None:
        ticket.results.fill(Result("error", detail=str(self.broken or "the reward pool was closed")))
        with contextlib.suppress(RuntimeError):  # its event loop was closed meanwhile: nobody waits
            ticket.sink.put(ticket)
            ticket.sink.flush()
