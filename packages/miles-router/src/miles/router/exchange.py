"""One request on its way: which worker has it, what of it was sent, what came back.

Subclasses are the client's side: they put the answer on the wire.  Every exchange ends exactly once, in one of four
outcomes, and is then counted.
"""

from __future__ import annotations

import asyncio
import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from miles.router.framing import Header, ResponseHead, connection_options

if TYPE_CHECKING:
    from miles.router.dispatcher import Dispatcher
    from miles.router.upstream import UpstreamConnection
    from miles.router.workers import Worker

_PEEK_BYTES = 4096
_JOIN_BYTES = 64 * 1024  # below it one joined write is cheaper than several
_REQUEST_ID = re.compile(rb'"rid"\s*:\s*("(?:[^"\\]|\\.){1,512}"|\[[^\[\]]{1,4096}\])')
_WRITTEN_ANEW = frozenset((b"content-length", b"transfer-encoding", b"host", b"expect", b"trailer"))


def request_ids(body: bytes) -> str | list[str] | None:
    """The engine's name for a request, its ``rid``; a list for a batch; None when the client gave none."""
    match = _REQUEST_ID.search(body)
    try:
        value = json.loads(match[1]) if match else None
    except ValueError:
        return None
    return value if isinstance(value, str | list) else None


class Outcome(StrEnum):
    """How an exchange ended."""

    ANSWERED = "answered"  # the client got a worker's whole answer
    REFUSED = "refused"  # the client got an error from the router
    CUT = "cut"  # the answer broke off; the client's connection was closed so that it sees that
    CANCELLED = "cancelled"  # the client left first


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that the router gives itself."""

    status: int
    message: str
    retry_after_s: int | None = None

    def body(self) -> bytes:
        """JSON in the form OpenAI clients expect of an error."""
        return json.dumps({"error": {"message": self.message, "type": "router_error", "code": self.status}}).encode()


class Exchange(ABC):
    """One request and its answer.  ``start`` is the loop time at which its head was complete."""

    __slots__ = (
        "attempts", "backoff", "bodiless", "body", "body_size", "connection", "declared_length", "dial", "dispatcher",
        "ended", "fresh", "headers", "held", "method", "peeked", "received", "replayable", "start", "started", "status",
        "streaming", "target", "tried", "uploaded", "waiting_since", "worker",
    )  # fmt: skip

    def __init__(
        self,
        dispatcher: Dispatcher,
        method: bytes,
        target: bytes,
        headers: list[Header],
        declared_length: int | None,
        start: float,
    ) -> None:
        self.dispatcher = dispatcher
        self.method = method
        self.target = target
        self.headers = headers
        self.declared_length = declared_length
        self.start = start
        self.bodiless = method == b"HEAD"
        # The request: pieces of its body, whether all came, whether all were written, whether it can be sent again.
        self.body: list[bytes] = []
        self.body_size = 0
        self.received = False
        self.uploaded = False
        self.streaming = False
        self.replayable = True
        self.peeked = b""
        # Its way: the worker it counts at, the connection that carries it.
        self.worker: Worker | None = None
        self.connection: UpstreamConnection | None = None
        self.dial: asyncio.Task[None] | None = None
        self.backoff: asyncio.TimerHandle | None = None
        self.waiting_since: float | None = None
        self.tried: tuple[Worker, ...] = ()
        self.attempts = 0
        self.fresh = False
        # The answer: its status, the part held back, whether any of it went to the client.
        self.status = 0
        self.held: tuple[ResponseHead, int, list[bytes]] | None = None
        self.started = False
        self.ended = False
        dispatcher.metrics.received += 1

    # The client's side.

    @abstractmethod
    def deliver_head(self, head: ResponseHead, data: bytes, body_at: int, complete: bool) -> None:
        """Send the head and ``data[body_at:]``, the first part of the body as on the wire."""

    @abstractmethod
    def deliver(self, data: bytes, complete: bool) -> None:
        """Send more of the body."""

    @abstractmethod
    def deliver_refusal(self, refusal: Refusal) -> None:
        """Send an answer of the router's own."""

    @abstractmethod
    def deliver_cut(self) -> None:
        """Close the client's connection in the middle of the answer."""

    @abstractmethod
    def pause_client(self) -> None:
        """Take no more of the request for now."""

    @abstractmethod
    def resume_client(self) -> None:
        """Take more of the request."""

    # What a policy may ask (RoutableRequest).

    def header(self, name: bytes) -> bytes | None:
        """Value of the first field called ``name`` (lower case)."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def body_start(self) -> bytes:
        """What is buffered of the body, all of it unless it is longer than ``--buffered-body-bytes``."""
        return self.body[0] if len(self.body) == 1 else b"".join(self.body)

    # Called by the client's side.

    def feed(self, data: bytes) -> None:
        """A piece of the request's body came."""
        if self.ended:
            return
        self.body_size += len(data)
        settings = self.dispatcher.settings
        if self.body_size > settings.max_body_bytes:
            self.refuse(Refusal(413, f"request body above {settings.max_body_bytes} bytes"))
        elif self.streaming and self.connection is not None:
            self._upload(data)
        else:
            self.body.append(data)
            if self.body_size > settings.buffered_body_bytes and not self.streaming:
                self.streaming = True
                self.pause_client()
                self.begin()

    def feed_end(self) -> None:
        """The request is complete."""
        self.received = True
        if self.ended:
            return
        if not self.streaming:
            self.begin()
        elif self.connection is not None:
            self._finish_upload()

    def begin(self) -> None:
        """Find a worker; called when the request is complete or longer than what is buffered."""
        self.dispatcher.place(self)

    def client_gone(self) -> None:
        """The client left: tell the worker, free its place."""
        if self.ended:
            return
        if self.worker is not None and self.connection is not None:
            self.dispatcher.abort_request(self.worker, request_ids(self.peeked or self.body_start()))
        self._detach()
        self._end(Outcome.CANCELLED)

    # Called by the dispatcher.

    def assign(self, worker: Worker) -> None:
        """Send the request to ``worker``."""
        self.worker = worker
        self.waiting_since = None
        worker.in_flight += 1
        worker.exchanges.add(self)
        self.dispatcher.in_flight += 1
        connection = None if self.fresh or self.streaming else worker.take_idle()
        if connection is not None:
            self.attach(connection)
        else:
            self.dial = self.dispatcher.connect(self, worker)

    def attach(self, connection: UpstreamConnection) -> None:
        """Write the request to ``connection``."""
        self.dial = None
        self.connection = connection
        self.attempts += 1
        connection.begin(self)
        head = self._request_head(connection.worker.authority)
        if not self.received:
            self.replayable = False
        if self.body_size < _JOIN_BYTES and self.received:
            connection.transport.write(b"".join((head, *self.body)))
            self.uploaded = True
            return
        pieces, self.uploaded = self.body, False
        if self.received:
            connection.transport.writelines((head, *pieces))
            self.uploaded = True
            return
        self.peeked = b"".join(pieces)[:_PEEK_BYTES]
        self.body = []
        connection.transport.write(head)
        for piece in pieces:
            self._upload(piece)
        self.resume_client()

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error, or cut an answer that has begun."""
        self._detach()
        if self.started:
            self._cut()
        else:
            self.status = refusal.status
            self.deliver_refusal(refusal)
            self._end(Outcome.REFUSED)

    def expire(self) -> None:
        """The request's time is over."""
        worker = self.worker
        if worker is not None:
            self.dispatcher.fleet.request_failed(worker, "timeout", "a request ran into its time limit")
        self.refuse(Refusal(504, f"no complete answer within {self.dispatcher.settings.request_timeout_s:g} s"))

    def reroute(self, reason: str, *, must_leave: bool) -> None:
        """Leave the worker for another one if that is safe; with ``must_leave`` end with an error if not."""
        worker = self.worker
        assert worker is not None
        movable = not self.started and self.replayable and self.attempts < self.dispatcher.settings.max_attempts
        if movable and any(other is not worker for other in self.dispatcher.fleet.ready):
            self._detach()
            self.tried += (worker,)
            self.dispatcher.retry(self)
        elif must_leave:
            self.refuse(Refusal(502, f"worker {worker.url} {reason}"))

    # Called by the connection (ResponseSink).

    def on_head(self, head: ResponseHead, data: bytes, body_at: int, complete: bool) -> None:
        self.status = head.status
        if complete:
            self._answered()
            self.deliver_head(head, data, body_at, True)
            self._end(Outcome.ANSWERED)
        elif head.length is not None and len(data) - body_at < self.dispatcher.settings.look_ahead_bytes:
            self.held = (head, body_at, [data])
        else:
            self._start()
            self.deliver_head(head, data, body_at, False)

    def on_data(self, data: bytes, complete: bool) -> None:
        if self.held is not None:
            head, body_at, pieces = self.held
            pieces.append(data)
            if not complete and sum(map(len, pieces)) - body_at < self.dispatcher.settings.look_ahead_bytes:
                return
            self.held = None
            if complete:
                self._answered()
            else:
                self._start()
            self.deliver_head(head, b"".join(pieces), body_at, complete)
        else:
            if complete:
                self._answered()
            self.deliver(data, complete)
        if complete:
            self._end(Outcome.ANSWERED)

    def on_lost(self, kind: str, reason: str) -> None:
        connection, worker = self.connection, self.worker
        assert worker is not None
        self.connection = self.dial = self.held = None
        self._release()
        stale = connection is not None and connection.reused and not connection.answering
        if stale:  # the worker had closed an idle connection: no fault, and it has not seen the request
            self.fresh = True
        else:
            self.dispatcher.fleet.request_failed(worker, kind, reason)
            self.tried += (worker,)
        if self.started:
            self._cut()
        elif self.replayable and (stale or kind == "connect" or self.attempts < self.dispatcher.settings.max_attempts):
            self.dispatcher.retry(self)
        else:
            self.refuse(Refusal(502, f"worker {worker.url}: {reason}"))

    def pause_upload(self) -> None:
        self.pause_client()

    def resume_upload(self) -> None:
        self.resume_client()

    # Inside.

    def _request_head(self, authority: bytes) -> bytes:
        dropped = connection_options(self.headers) | _WRITTEN_ANEW
        lines = [b"%b: %b\r\n" % field for field in self.headers if field[0] not in dropped]
        if self.declared_length is not None:
            lines.append(b"content-length: %d\r\n" % self.declared_length)
        elif not self.received:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif self.body_size:
            lines.append(b"content-length: %d\r\n" % self.body_size)
        return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b\r\n" % (self.method, self.target, authority, b"".join(lines))

    def _upload(self, data: bytes) -> None:
        assert self.connection is not None
        if self.declared_length is None:
            self.connection.transport.writelines((b"%x\r\n" % len(data), data, b"\r\n"))
        else:
            self.connection.transport.write(data)

    def _finish_upload(self) -> None:
        assert self.connection is not None
        if self.declared_length is None:
            self.connection.transport.write(b"0\r\n\r\n")
        self.uploaded = True

    def _start(self) -> None:
        self.started = True
        if self.body:
            self.peeked = self.body_start()[:_PEEK_BYTES]
            self.body = []

    def _answered(self) -> None:
        worker = self.worker
        assert worker is not None
        self.connection = None
        self.started = True
        self._release()
        worker.statuses[self.status // 100] += 1
        if self.status >= 500:
            self.dispatcher.fleet.request_failed(worker, "status", f"answered {self.status}")
        elif worker.request_failures:
            self.dispatcher.fleet.request_succeeded(worker)

    def _cut(self) -> None:
        self.deliver_cut()
        self._end(Outcome.CUT)

    def _detach(self) -> None:
        """Stop everything that is under way for this request."""
        self.dispatcher.forget(self)
        if self.backoff is not None:
            self.backoff.cancel()
            self.backoff = None
        if self.dial is not None:
            self.dial.cancel()
            self.dial = None
        if self.connection is not None:
            self.connection.abandon()
            self.connection = None
        self.held = None
        self._release()

    def _release(self) -> None:
        worker = self.worker
        if worker is not None:
            self.worker = None
            worker.in_flight -= 1
            worker.exchanges.discard(self)
            self.dispatcher.released(worker)

    def _end(self, outcome: Outcome) -> None:
        self.ended = True
        self.body = []
        self.dispatcher.metrics.ended(outcome, self.status, self.dispatcher.loop.time() - self.start)
