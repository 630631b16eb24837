"""Gives requests to workers: choice, queue, retries, time limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import OrderedDict

from miles.router.exchange import Exchange
from miles.router.fetch import FetchError, fetch, open_connection
from miles.router.metrics import Metrics
from miles.router.policies import Policy
from miles.router.refusal import Refusal
from miles.router.relay import KernelPipe
from miles.router.settings import Settings
from miles.router.workers import Fleet, Worker

logger = logging.getLogger("miles.router")

_BACKOFF_S = 0.1  # before a worker is tried a second time, doubled each time after
_BACKOFF_LIMIT_S = 1.0
_RETRY_AFTER_S = 1
_ABORT_TIMEOUT_S = 5.0


class Dispatcher:
    """All requests that are under way.  Lives in one event loop."""

    def __init__(self, settings: Settings, fleet: Fleet, policy: Policy, metrics: Metrics) -> None:
        self.settings = settings
        self.fleet = fleet
        self.policy = policy
        self.metrics = metrics
        self.loop = asyncio.get_running_loop()
        self.buffered_body_bytes = min(settings.buffered_body_bytes, settings.max_body_bytes)
        self.waiting: OrderedDict[Exchange, None] = OrderedDict()
        self._limited = settings.max_connections is not None or settings.max_in_flight_per_worker is not None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pipe: KernelPipe | None = None
        fleet.on_ready = self.pump
        fleet.on_quarantine = self._leave

    @property
    def in_flight(self) -> int:
        """Requests at workers."""
        return sum(worker.in_flight for worker in self.fleet)

    def place(self, exchange: Exchange) -> None:
        """Send ``exchange`` to a worker, or let it wait for one."""
        if not self.waiting and (worker := self._choose(exchange)) is not None:
            exchange.assign(worker)
        elif exchange.ended:  # its choice failed
            return
        elif not len(self.fleet):
            exchange.refuse(Refusal(503, "no worker is registered", _RETRY_AFTER_S))
        elif len(self.waiting) >= self.settings.queue_size:
            exchange.refuse(Refusal(503, f"{len(self.waiting)} requests wait for a worker already", _RETRY_AFTER_S))
        else:
            exchange.waiting_since = self.loop.time()
            self.waiting[exchange] = None

    def retry(self, exchange: Exchange) -> None:
        """Send ``exchange`` again: to a worker that has not had it, or after a pause."""
        self.metrics.retries += 1
        ready = self.fleet.ready
        if exchange.fresh or not ready or any(worker not in exchange.tried for worker in ready):
            self.place(exchange)
            return
        pause_s = min(_BACKOFF_S * 2 ** (len(exchange.tried) - 1), _BACKOFF_LIMIT_S)
        exchange.backoff = self.loop.call_later(pause_s, self.place, exchange)

    def pipe(self) -> KernelPipe:
        """What carries long answers inside the kernel."""
        if self._pipe is None:
            self._pipe = KernelPipe()
        return self._pipe

    def forget(self, exchange: Exchange) -> None:
        """``exchange`` waits no longer."""
        self.waiting.pop(exchange, None)

    def released(self, worker: Worker) -> None:
        """``worker`` has finished with one request."""
        if self.waiting:
            self.pump()
        if worker.draining and not worker.in_flight:
            worker.drained.set()

    def pump(self) -> None:
        """Give waiting requests to workers while there is room."""
        while self.waiting:
            exchange = next(iter(self.waiting))
            worker = self._choose(exchange)
            if worker is not None:
                self.waiting.popitem(last=False)
                exchange.assign(worker)
            elif not exchange.ended:
                return

    def connect(self, exchange: Exchange, worker: Worker) -> asyncio.Task[None]:
        """Open a connection for ``exchange``, which learns how that went."""
        return self.loop.create_task(self._connect(exchange, worker))

    def abort_request(self, worker: Worker, rid: str | list[str] | None) -> None:
        """Tell ``worker`` that nobody waits for ``rid`` any more."""
        rids = [rid] if isinstance(rid, str) else rid or []
        for one in rids:
            task = self.loop.create_task(self._abort(worker, one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def remove(self, worker: Worker, timeout_s: float) -> int:
        """Drain ``worker`` and forget it; the number of requests that were cut or moved after ``timeout_s``."""
        self.fleet.drain(worker)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await worker.drained.wait()
        if not worker.draining:  # it was added again meanwhile
            return 0
        late = list(worker.exchanges)
        for exchange in late:
            exchange.reroute("was removed", must_leave=True)
        self.fleet.discard(worker)
        for connection in list(worker.idle):
            connection.abandon()
        return len(late)

    def sweep(self) -> None:
        """Enforce time limits; called about once a second."""
        now = self.loop.time()
        for exchange in list(self.waiting):
            if exchange.waiting_since is None or now - exchange.waiting_since < self.settings.queue_timeout_s:
                break
            exchange.refuse(Refusal(503, "no worker became free in time", _RETRY_AFTER_S))
        limit_s = self.settings.request_timeout_s
        for worker in self.fleet:
            if limit_s is not None:
                for exchange in [one for one in worker.exchanges if now - one.start > limit_s]:
                    exchange.expire()
            for connection in list(worker.idle):
                if not connection.idle_since:
                    connection.idle_since = now
                elif now - connection.idle_since > self.settings.worker_idle_timeout_s:
                    connection.abandon()

    def stop(self) -> None:
        """End every request that is left."""
        refusal = Refusal(503, "the router is shutting down", _RETRY_AFTER_S)
        for exchange in [*self.waiting, *(one for worker in self.fleet for one in worker.exchanges)]:
            exchange.refuse(refusal)
        for task in self._tasks:
            task.cancel()
        for worker in self.fleet:
            for connection in list(worker.idle):
                connection.abandon()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _choose(self, exchange: Exchange) -> Worker | None:
        ready = self.fleet.ready
        if self._limited or exchange.tried:
            ready = self._eligible(exchange)
        try:
            return self.policy.choose(ready, exchange) if ready else None
        except Exception:  # a plugin's fault must cost one request, not the router
            logger.exception("policy %s failed", self.settings.policy)
            exchange.refuse(Refusal(500, f"policy {self.settings.policy} failed"))
            return None

    def _eligible(self, exchange: Exchange) -> list[Worker]:
        """Ready workers below their limit, those that have not had ``exchange`` if there are any."""
        settings, ready = self.settings, self.fleet.ready
        if settings.max_connections is not None and self.in_flight >= settings.max_connections:
            return []
        if settings.max_in_flight_per_worker is not None:
            ready = [worker for worker in ready if worker.in_flight < settings.max_in_flight_per_worker]
        return [worker for worker in ready if worker not in exchange.tried] or ready

    def _leave(self, worker: Worker) -> None:
        for exchange in list(worker.exchanges):
            exchange.reroute("was quarantined", must_leave=False)

    async def _connect(self, exchange: Exchange, worker: Worker) -> None:
        try:
            async with asyncio.timeout(self.settings.connect_timeout_s):
                connection = await open_connection(worker)
        except TimeoutError:
            exchange.on_lost("connect", f"no connection within {self.settings.connect_timeout_s:g} s")
        except OSError as error:
            exchange.on_lost("connect", f"no connection: {error}")
        else:
            exchange.attach(connection)

    async def _abort(self, worker: Worker, rid: str) -> None:
        body = json.dumps({"rid": rid}).encode()
        fields = [(b"content-type", b"application/json")]
        try:
            await fetch(worker, "POST", "/abort_request", headers=fields, body=body, timeout_s=_ABORT_TIMEOUT_S)
        except FetchError as error:
            logger.info("worker %s was not told to abort %s: %s", worker.url, rid, error)
