"""One keep-alive connection to a worker: takes a request, hands the answer's bytes to a sink as they arrive."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from miles.router.framing import (
    BadResponseError,
    ChunkScanner,
    PlainAnswer,
    ResponseHead,
    read_plain_answer,
    read_response_head,
)
from miles.router.relay import RELAY_BYTES, KernelPipe, Relay
from miles.router.workers import Worker


class ResponseSink(Protocol):
    """Who asked.  Exactly one of a call with ``complete`` true or ``on_lost`` ends each request."""

    bodiless: bool
    """Whether the request was HEAD, whose answer has no body."""

    uploaded: bool
    """Whether the whole request has been written."""

    def on_whole(self, answer: PlainAnswer, data: bytes, body_at: int) -> None:
        """The answer, all of it, as on the wire; its head is plain and may go to the client as it is."""

    def on_head(self, head: ResponseHead, data: bytes, body_at: int, complete: bool) -> None:
        """The answer begins.  ``data[body_at:]`` is the first part of its body, as on the wire."""

    def on_data(self, data: bytes, complete: bool) -> None:
        """More of the body, as on the wire."""

    def on_lost(self, kind: str, reason: str) -> None:
        """The connection is gone before the answer was complete."""

    def way_out(self, last_bytes: int) -> tuple[KernelPipe, asyncio.Transport] | None:
        """Where the rest of the body may go unseen, as on the wire; None if it must come by ``on_data``.

        ``last_bytes``: how many were handed over just now.
        """

    def pause_upload(self) -> None:
        """The worker takes no more bytes for now."""

    def resume_upload(self) -> None:
        """It does again."""


class UpstreamConnection(asyncio.Protocol):
    """A connection to ``worker``; serves one request at a time and lies in ``worker.idle`` in between."""

    __slots__ = (
        "_chunks",
        "_head",
        "_partial",
        "_paused",
        "_relay",
        "idle_since",
        "left",
        "reused",
        "sink",
        "transport",
        "worker",
    )

    transport: asyncio.Transport

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.sink: ResponseSink | None = None
        self.reused = False
        self.idle_since = 0.0  # when it was first found idle; 0 while in use
        self._paused = False
        self._head: ResponseHead | None = None
        self._partial = b""  # an unfinished head
        self.left = 0  # bytes of the body that have not come, where its length is known
        self._relay: Relay | None = None
        self._chunks: ChunkScanner | None = None

    @property
    def answering(self) -> bool:
        """Whether any byte of an answer has come."""
        return self._head is not None or bool(self._partial)

    def begin(self, sink: ResponseSink) -> None:
        """Make ``sink`` the one that gets the next answer.  The request is then written to ``transport``."""
        self.sink = sink
        self.idle_since = 0.0
        self._head = None
        self._partial = b""
        self.left = 0

    def pause(self) -> None:
        """Stop reading: the client is slower than the worker."""
        if self._relay is not None:
            self.end_relay(0, b"")
        self._paused = True
        self.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._paused:
            self._paused = False
            self.transport.resume_reading()

    def abandon(self) -> None:
        """Close at once and tell nobody: the answer is not wanted any more."""
        self.sink = None
        self._close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.sink is None:  # nobody asked: not an answer
            self._close()
            return
        try:
            if self._head is not None:
                self._read_body(self.sink, data)
            elif not self._read_whole(self.sink, data):
                self._read_head(self.sink, data)
            if self.left > RELAY_BYTES:
                self._start_relay(len(data))
        except BadResponseError as error:
            self._lose("garbage", str(error))

    def eof_received(self) -> None:
        self.worker.idle.pop(self, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.worker.idle.pop(self, None)
        if self._relay is not None:
            self.end_relay(0, b"")
        sink = self.sink
        if sink is None:
            return
        head = self._head
        if head is not None and head.length is None and not head.chunked and exc is None:
            self.sink = None
            sink.on_data(b"", True)
        else:
            self._lose("reset", "worker closed the connection" if exc is None else f"connection failed: {exc}")

    def pause_writing(self) -> None:
        if self.sink is not None:
            self.sink.pause_upload()

    def resume_writing(self) -> None:
        if self.sink is not None:
            self.sink.resume_upload()

    def _read_whole(self, sink: ResponseSink, data: bytes) -> bool:
        """Read an answer of the usual form that came in one piece; nothing has happened when the result is False."""
        plain = None if self._partial or sink.bodiless else read_plain_answer(data)
        if plain is None or plain[1] != len(data) - plain[2]:
            return False
        self.sink = None
        if sink.uploaded:
            self.reused = True
            self.worker.idle[self] = None
        else:
            self.transport.abort()
        sink.on_whole(plain[0], data, plain[2])
        return True

    def _read_head(self, sink: ResponseSink, data: bytes) -> None:
        if self._partial:
            data = self._partial + data
            self._partial = b""
        found = read_response_head(data, sink.bodiless)
        if found is None:
            self._partial = data
            return
        head, body_at = found
        if head.status < 200:
            self._skip_interim(sink, head.status, data[body_at:])
            return
        self._head = head
        if head.length is not None:
            self.left = head.length - (len(data) - body_at)
            complete = self.left <= 0
            if self.left < 0:
                data = data[: self.left]
        else:
            self._chunks = ChunkScanner() if head.chunked else None
            wire = data[body_at:]
            used = self._chunks.feed(wire) if self._chunks else len(wire)
            complete = self._chunks is not None and self._chunks.done
            if used < len(wire):
                self.left = -1
                data = data[: body_at + used]
        if complete:
            self._finish(head)
        sink.on_head(head, data, body_at, complete)

    def _skip_interim(self, sink: ResponseSink, status: int, rest: bytes) -> None:
        if status == 101:
            raise BadResponseError("worker switched protocols unasked")
        if rest:
            self._read_head(sink, rest)

    def _read_body(self, sink: ResponseSink, data: bytes) -> None:
        head = self._head
        assert head is not None
        complete = False
        if head.length is not None:
            self.left -= len(data)
            complete = self.left <= 0
            if self.left < 0:
                data = data[: self.left]
        elif self._chunks is not None:
            used = self._chunks.feed(data)
            complete = self._chunks.done
            if used < len(data):
                self.left = -1
                data = data[:used]
        if complete:
            self._finish(head)
        sink.on_data(data, complete)

    def _start_relay(self, last_bytes: int) -> None:
        """Let the kernel forward the rest of the body, if the client's connection permits."""
        if self.sink is None or self._paused or self.worker.tls is not None:
            return
        way = self.sink.way_out(last_bytes)
        if way is not None:
            self._relay = Relay(*way, self)
            self._relay.move()

    def end_relay(self, moved: int, rest: bytes) -> None:
        """``moved`` bytes left the worker's socket; all but ``rest``, the last of them, went to the client."""
        relay, self._relay = self._relay, None
        assert relay is not None
        relay.stop()
        if not self._paused:
            self.transport.resume_reading()
        self.left -= moved - len(rest)
        if rest and self.sink is not None:
            self._read_body(self.sink, rest)

    def _finish(self, head: ResponseHead) -> None:
        """Make the connection ready for another request, or close it when the worker wants that or sent too much."""
        sink, self.sink = self.sink, None
        assert sink is not None
        if head.keep_alive and self.left >= 0 and sink.uploaded:
            self.reused = True
            self.worker.idle[self] = None
        else:
            self.transport.abort()

    def _close(self) -> None:
        self.worker.idle.pop(self, None)
        if self._relay is not None:
            self.end_relay(0, b"")
        self.transport.abort()

    def _lose(self, kind: str, reason: str) -> None:
        sink, self.sink = self.sink, None
        self._close()
        if sink is not None:
            sink.on_lost(kind, reason)
