"""The workers behind the router, and what is known about each.

States: ``probing`` (not admitted yet), ``healthy``, ``suspect`` (failed lately: used only when nobody is healthy),
``quarantined`` (never used, checked until it is well again).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from miles.core.errors import ConfigError

if TYPE_CHECKING:
    from miles.router.exchange import Exchange
    from miles.router.upstream import UpstreamConnection

logger = logging.getLogger("miles.router")


class WorkerState(StrEnum):
    """Where a worker stands."""

    PROBING = "probing"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    QUARANTINED = "quarantined"


class Worker:
    """One engine server."""

    __slots__ = (
        "address", "admitted", "authority", "drained", "draining", "exchanges", "failures", "idle", "in_flight",
        "passes", "probe_failures", "reason", "request_failures", "state", "statuses", "tls", "url", "wake", "weight",
        "weight_version",
    )  # fmt: skip

    def __init__(self, url: str) -> None:
        self.url, self.address, self.authority, self.tls = _parse_url(url)
        self.weight = 1.0
        self.state = WorkerState.PROBING
        self.reason = "not checked yet"
        self.admitted = False  # whether it has ever been healthy
        self.draining = False
        self.drained = asyncio.Event()
        self.wake = asyncio.Event()  # set: check it now
        self.in_flight = 0
        self.exchanges: set[Exchange] = set()
        self.idle: dict[
            UpstreamConnection, None
        ] = {}  # open connections without a request, the one used last at the end
        self.request_failures = 0  # in a row
        self.probe_failures = 0  # in a row
        self.passes = 0  # health checks passed in a row since quarantine
        self.weight_version: str | None = None
        self.statuses = [0] * 6  # answers, by hundreds of their status
        self.failures: Counter[str] = Counter()  # attempts without a usable answer, by kind


class Fleet:
    """All registered workers.  ``ready`` are those that get requests now: the healthy ones, else the suspects."""

    def __init__(self, *, failure_threshold: int, readmission_checks: int) -> None:
        self.ready: list[Worker] = []
        self.weight_version: str | None = None
        """The newest version a healthy worker holds; remembered when no healthy one is left."""
        self.on_ready: Callable[[], None] = lambda: None
        """Called when a worker starts to get requests."""
        self.on_quarantine: Callable[[Worker], None] = lambda worker: None
        self._workers: dict[str, Worker] = {}
        self._failure_threshold = failure_threshold
        self._readmission_checks = readmission_checks

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, url: str) -> Worker | None:
        """The registered worker with this URL, written in any equivalent way."""
        return self._workers.get(_parse_url(url)[0])

    def add(self, url: str, weight: float | None = None) -> Worker:
        """Register a worker; it gets requests once it passes a health check.  Adding it again ends its draining."""
        if weight is not None:
            _check_weight(url, weight)
        worker = self.get(url)
        if worker is None:
            worker = Worker(url)
            self._workers[worker.url] = worker
            logger.info("worker %s added", worker.url)
        elif worker.draining:
            worker.draining = False
            worker.drained.set()  # whoever waits to remove it must know
            self._refresh()
        worker.weight = worker.weight if weight is None else weight
        worker.wake.set()
        return worker

    def drain(self, worker: Worker) -> None:
        """Send no new request to ``worker``; ``worker.drained`` is set when its last one ends."""
        worker.draining = True
        worker.drained.clear()
        if not worker.in_flight:
            worker.drained.set()
        self._refresh()

    def discard(self, worker: Worker) -> None:
        """Forget ``worker``."""
        self._workers.pop(worker.url, None)
        self._refresh()
        logger.info("worker %s removed", worker.url)

    def request_succeeded(self, worker: Worker) -> None:
        """``worker`` answered a request."""
        worker.request_failures = 0
        if worker.state is WorkerState.SUSPECT and not worker.probe_failures:
            self._move(worker, WorkerState.HEALTHY, "answered a request")

    def request_failed(self, worker: Worker, kind: str, reason: str) -> None:
        """A request to ``worker`` got no usable answer.

        ``kind`` "status" (a 5xx answer) never takes the last worker out: the fault may be the request's.
        """
        worker.failures[kind] += 1
        worker.request_failures += 1
        worker.wake.set()
        last_one = kind == "status" and self.ready == [worker]
        if worker.request_failures >= self._failure_threshold and not last_one:
            self._move(worker, WorkerState.QUARANTINED, reason)
        elif worker.state is WorkerState.HEALTHY:
            self._move(worker, WorkerState.SUSPECT, reason)

    def probe_failed(self, worker: Worker, reason: str) -> None:
        """``worker`` failed a health check."""
        worker.probe_failures += 1
        worker.passes = 0
        admitted = worker.state in (WorkerState.HEALTHY, WorkerState.SUSPECT)
        if admitted and worker.probe_failures < self._failure_threshold:
            self._move(worker, WorkerState.SUSPECT, reason)
        else:
            self._move(worker, WorkerState.QUARANTINED, reason)

    def probe_passed(self, worker: Worker, weight_version: str | None) -> None:
        """``worker`` passed a health check and reports ``weight_version``, None when it has no such thing."""
        worker.probe_failures = 0
        worker.weight_version = weight_version
        if worker.state in (WorkerState.HEALTHY, WorkerState.SUSPECT):
            self._move(worker, WorkerState.HEALTHY, "passes health checks")
        elif not self._has_current_weights(worker):
            worker.passes = 0
            self._move(worker, WorkerState.QUARANTINED, f"holds weights {weight_version}, not {self.weight_version}")
        else:
            self._consider(worker)
        self._learn_weight_version()

    def _consider(self, worker: Worker) -> None:
        """Admit a worker that passed enough checks; the first time one is enough."""
        worker.passes += 1
        if worker.passes < self._readmission_checks and worker.admitted:
            self._move(worker, WorkerState.PROBING, "passed a health check")
            return
        worker.passes = 0
        # One more failed request sends a worker straight back that left because of failed requests.
        worker.request_failures = min(worker.request_failures, self._failure_threshold - 1)
        self._move(worker, WorkerState.HEALTHY, "passes health checks")

    def _has_current_weights(self, worker: Worker) -> bool:
        current, own = self.weight_version, worker.weight_version
        if current is None or own is None or own == current:
            return True
        # Counted versions are younger than names such as "default", with which engines start.
        return own.isdecimal() and (not current.isdecimal() or int(own) > int(current))

    def _learn_weight_version(self) -> None:
        versions = [w.weight_version for w in self._workers.values() if w.state is WorkerState.HEALTHY]
        known = [version for version in versions if version is not None]
        if known and all(version.isdecimal() for version in known):
            self.weight_version = max(known, key=int)
        elif known:
            self.weight_version = Counter(known).most_common(1)[0][0]

    def _move(self, worker: Worker, state: WorkerState, reason: str) -> None:
        changed = worker.state is not state
        if changed or state is not WorkerState.HEALTHY:
            worker.reason = reason
        if not changed:
            return
        level = logging.INFO if state in (WorkerState.HEALTHY, WorkerState.PROBING) else logging.WARNING
        logger.log(level, "worker %s: %s -> %s (%s)", worker.url, worker.state, state, reason)
        worker.state = state
        worker.admitted |= state is WorkerState.HEALTHY
        self._refresh()
        if state is WorkerState.QUARANTINED:
            self.on_quarantine(worker)

    def _refresh(self) -> None:
        serving = [worker for worker in self._workers.values() if not worker.draining]
        healthy = [worker for worker in serving if worker.state is WorkerState.HEALTHY]
        self.ready = healthy or [worker for worker in serving if worker.state is WorkerState.SUSPECT]
        if self.ready:
            self.on_ready()


def parse_worker(text: str) -> tuple[str, float]:
    """``http://host:port`` or ``http://host:port=weight`` as URL and weight; raises ConfigError."""
    url, separator, given = text.strip().partition("=")
    _parse_url(url)
    try:
        weight = float(given) if separator else 1.0
    except ValueError:
        raise ConfigError(f"worker {text}: expected a number after '=', for example {url}=2") from None
    _check_weight(url, weight)
    return url, weight


def _check_weight(url: str, weight: float) -> None:
    if not 0 < weight < float("inf"):
        raise ConfigError(f"worker {url}: weight {weight} must be a finite number above 0")


def _parse_url(url: str) -> tuple[str, tuple[str, int], bytes, ssl.SSLContext | None]:
    """Normal form, address, value of the Host field, and TLS settings of a worker's URL."""
    expected = f"worker {url!r}: expected http://host:port or https://host:port"
    try:
        parts = urlsplit(url)
        port = parts.port
        authority = parts.netloc.lower().encode("ascii")
    except (ValueError, UnicodeError) as error:
        raise ConfigError(f"{expected} ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(expected)
    if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError(f"{expected}, without path, query or user name")
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    address = (parts.hostname, port or (443 if tls else 80))
    return f"{parts.scheme}://{authority.decode()}", address, authority, tls
