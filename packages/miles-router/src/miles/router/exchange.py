"""One request on its way: which worker has it, what of it was sent, what came back.

Subclasses are the client's side: they put the answer on the wire.  Every exchange ends exactly once, in one of four
outcomes, and is then counted.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from miles.router.framing import Header, PlainAnswer, ResponseHead, plain_head
from miles.router.refusal import Refusal
from miles.router.upload import request_head, request_ids

if TYPE_CHECKING:
    from miles.router.dispatcher import Dispatcher
    from miles.router.relay import KernelPipe
    from miles.router.upstream import UpstreamConnection
    from miles.router.workers import Worker

_PEEK_BYTES = 4096
JOIN_BYTES = 64 * 1024
"""Below it one joined write is cheaper than several."""


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
    ) -> None:
        self.dispatcher = dispatcher
        self.method = method
        self.target = target
        self.headers = headers
        self.declared_length = declared_length
        self.bodiless = method == b"HEAD"
        self.start = dispatcher.loop.time()
        # The request: pieces of its body; whether all came, whether all were written, whether it can be sent again.
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
        """Send the head and ``data[body_at:]``, the first part of the body as on the wire.

        ``data[:body_at]`` is the head as on the wire.
        """

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
                return value.strip(b" \t")
        return None

    def body_start(self) -> bytes:
        """What is buffered of the body, all of it unless it is longer than ``--buffered-body-bytes``."""
        return self.body[0] if len(self.body) == 1 else b"".join(self.body)

    # Called by the client's side.

    def feed(self, data: bytes) -> None:
        """A piece of the request's body came."""
        self.body_size += len(data)
        if self.body_size <= self.dispatcher.buffered_body_bytes:
            self.body.append(data)
        elif not self.ended:
            self._feed_long(data)

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
        self._end()
        self.dispatcher.metrics.cancelled += 1

    # Called by the dispatcher.

    def assign(self, worker: Worker) -> None:
        """Send the request to ``worker``."""
        self.worker = worker
        self.waiting_since = None
        worker.in_flight += 1
        worker.exchanges.add(self)
        if worker.idle and not self.fresh and not self.streaming:
            self.attach(worker.idle.popitem()[0])
        else:
            self.dial = self.dispatcher.connect(self, worker)

    def attach(self, connection: UpstreamConnection) -> None:
        """Write the request to ``connection``."""
        self.dial = None
        self.connection = connection
        self.attempts += 1
        connection.begin(self)
        self._send(connection)

    def _send(self, connection: UpstreamConnection) -> None:
        authority = connection.worker.authority
        head = request_head(self.method, self.target, authority, self.headers, self._framing())
        if not self.received:
            self._begin_upload(connection, head)
            return
        self.uploaded = True
        if self.body_size < JOIN_BYTES:
            connection.transport.write(b"".join((head, *self.body)))
        else:
            connection.transport.writelines((head, *self.body))

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error, or cut an answer that has begun."""
        self._detach()
        if self.started:
            self._cut()
            return
        self._end()
        self.dispatcher.metrics.refused(refusal.status)
        self.deliver_refusal(refusal)

    def expire(self) -> None:
        """The request's time is over."""
        worker = self.worker
        if worker is not None:
            self.dispatcher.fleet.request_failed(worker, "timeout", "a request ran into its time limit")
        if not self.ended:
            limit_s = self.dispatcher.settings.request_timeout_s
            self.refuse(Refusal(504, f"no complete answer within {limit_s} s"))

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
        elif head.length is not None and len(data) - body_at < self.dispatcher.settings.look_ahead_bytes:
            self.held = (head, body_at, [data])
        else:
            self._start()
            self.deliver_head(head, data, body_at, False)

    def on_whole(self, answer: PlainAnswer, data: bytes, body_at: int) -> None:
        self.on_head(plain_head(answer.status, len(data) - body_at, data, body_at), data, body_at, True)

    def on_data(self, data: bytes, complete: bool) -> None:
        if self.held is None:
            if complete:
                self._answered()
            self.deliver(data, complete)
            return
        head, body_at, pieces = self.held
        pieces.append(data)
        if complete:
            self._answered()
        elif sum(map(len, pieces)) - body_at < self.dispatcher.settings.look_ahead_bytes:
            return
        else:
            self._start()
        self.held = None
        self.deliver_head(head, b"".join(pieces), body_at, complete)

    def way_out(self, last_bytes: int) -> tuple[KernelPipe, asyncio.Transport] | None:
        return None

    def on_lost(self, kind: str, reason: str) -> None:
        connection, worker = self.connection, self.worker
        assert worker is not None
        self.connection = self.dial = self.held = None
        self._release(worker)
        stale = connection is not None and connection.reused and not connection.answering
        if stale:  # the worker had closed an idle connection: no fault, and it has not seen the request
            self.fresh = True
        else:
            self.tried += (worker,)
            self.dispatcher.fleet.request_failed(worker, kind, reason)
        again = stale or kind == "connect" or self.attempts < self.dispatcher.settings.max_attempts
        if self.replayable and again and not self.started:
            self.dispatcher.retry(self)
        else:
            self.refuse(Refusal(502, f"worker {worker.url}: {reason}"))

    def pause_upload(self) -> None:
        self.pause_client()

    def resume_upload(self) -> None:
        self.resume_client()

    # Inside.

    def _framing(self) -> bytes:
        """The line that tells the worker where the body ends; empty without a body."""
        if self.received:  # what came counts: a middleware may have replaced the body but not its length
            unsaid = self.declared_length is None and not self.body_size
            return b"" if unsaid else b"content-length: %d\r\n" % self.body_size
        if self.declared_length is None:
            return b"transfer-encoding: chunked\r\n"
        return b"content-length: %d\r\n" % self.declared_length

    def _feed_long(self, data: bytes) -> None:
        limit = self.dispatcher.settings.max_body_bytes
        if self.body_size > limit:
            self.refuse(Refusal(413, f"request body above {limit} bytes"))
        elif self.connection is not None and self.streaming:
            self._upload(self.connection, data)
        else:
            self.body.append(data)
            if not self.streaming:
                self.streaming = True
                self.begin()

    def _begin_upload(self, connection: UpstreamConnection, head: bytes) -> None:
        """Write what has come of a long request; the rest is passed on as it arrives, and cannot be sent again."""
        self.replayable = False
        pieces, self.body = self.body, []
        self.peeked = b"".join(pieces)[:_PEEK_BYTES]
        connection.transport.write(head)
        for piece in pieces:
            self._upload(connection, piece)
        self.resume_client()

    def _upload(self, connection: UpstreamConnection, data: bytes) -> None:
        if self.declared_length is None:
            connection.transport.writelines((b"%x\r\n" % len(data), data, b"\r\n"))
        else:
            connection.transport.write(data)

    def _finish_upload(self) -> None:
        assert self.connection is not None
        if self.declared_length is None:
            self.connection.transport.write(b"0\r\n\r\n")
        self.uploaded = True

    def _start(self) -> None:
        """The first bytes of the answer are about to go to the client: from now on there is no second try."""
        self.started = True
        if self.body:
            self.peeked = self.body_start()[:_PEEK_BYTES]
            self.body = []

    def _answered(self) -> None:
        """The answer is complete: free the worker's place and count, before the client hears of it."""
        worker = self.worker
        assert worker is not None
        self.connection = None
        self.started = True
        self._release(worker)
        status = self.status
        worker.statuses[status // 100] += 1
        if status >= 500:
            self.dispatcher.fleet.request_failed(worker, "status", f"answered {status}")
        elif worker.request_failures:
            self.dispatcher.fleet.request_succeeded(worker)
        self._end()
        self.dispatcher.metrics.answered += 1

    def _cut(self) -> None:
        self._end()
        self.dispatcher.metrics.cut += 1
        self.deliver_cut()

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
        if self.worker is not None:
            self._release(self.worker)

    def _release(self, worker: Worker) -> None:
        self.worker = None
        worker.in_flight -= 1
        worker.exchanges.discard(self)
        if worker.draining or self.dispatcher.waiting:
            self.dispatcher.released(worker)

    def _end(self) -> None:
        self.ended = True
        self.body = []
        dispatcher = self.dispatcher
        dispatcher.metrics.observe(dispatcher.loop.time() - self.start)
