"""A proxied request of the fast path: what it writes to the client, and how it takes its turn on the connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles.router.exchange import Exchange
from miles.router.framing import ChunkScanner, Header, PlainAnswer, ResponseHead
from miles.router.refusal import Refusal, refusal_bytes
from miles.router.relay import KernelPipe, can_relay

if TYPE_CHECKING:
    import asyncio

    from miles.router.protocol import RouterProtocol


class _Signal:
    """In place of the event of uvicorn's cycles, for which nobody waits here."""

    def set(self) -> None:
        """Nobody hears it."""


class HotExchange(Exchange):
    """A proxied request of a RouterProtocol, and a cycle in uvicorn's pipeline."""

    __slots__ = (
        "active", "disconnected", "expects_continue", "keep_alive", "late_refusal", "old", "protocol", "rechunked",
        "response_complete", "scanner",
    )  # fmt: skip

    message_event = _Signal()

    def __init__(
        self,
        protocol: RouterProtocol,
        method: bytes,
        target: bytes,
        headers: list[Header],
        declared_length: int | None,
        keep_alive: bool,
    ) -> None:
        super().__init__(protocol.dispatcher, method, target, headers, declared_length)
        self.protocol = protocol
        self.keep_alive = keep_alive
        self.expects_continue = protocol.expect_100_continue
        self.disconnected = False
        self.response_complete = False
        self.active = False  # whether the answers to all earlier requests are complete
        self.old = False  # the client speaks HTTP/1.0, which has no chunks
        self.rechunked = False  # the worker's body ends with its connection, the client's with a chunk
        self.scanner: ChunkScanner | None = None  # takes the worker's chunks apart
        self.late_refusal: Refusal | None = None

    @property
    def more_body(self) -> bool:
        """Whether the client has not sent all yet."""
        return not self.received

    def activate(self) -> None:
        """All earlier requests of the connection are answered."""
        self.active = True
        self.protocol.running = self
        if self.late_refusal is not None:
            self.deliver_refusal(self.late_refusal)
        elif self.received or self.streaming:
            self.begin()
        elif self.expects_continue:
            self.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def begin(self) -> None:
        if self.active:
            if self.streaming:
                self.pause_client()
            self.dispatcher.place(self)

    def deliver_head(self, head: ResponseHead, data: bytes, body_at: int, complete: bool) -> None:
        if head.plain and self.keep_alive:
            self.protocol.transport.write(data)
        else:
            self.protocol.transport.write(self._adapted(head))
            self._write_body(data[body_at:], complete)
        if complete:
            self._finish()
        elif self.protocol.flow.write_paused:
            self.choke()

    def on_whole(self, answer: PlainAnswer, data: bytes, body_at: int) -> None:
        if not self.keep_alive:
            super().on_whole(answer, data, body_at)
            return
        self.status = answer.status
        self._answered()
        self.protocol.transport.write(data)
        self._finish()

    def deliver(self, data: bytes, complete: bool) -> None:
        self._write_body(data, complete)
        if complete:
            self._finish()
        elif self.protocol.flow.write_paused:
            self.choke()

    def way_out(self, last_bytes: int) -> tuple[KernelPipe, asyncio.Transport] | None:
        client = self.protocol.transport
        slow = client.get_write_buffer_size() > last_bytes
        if slow or not self.started or client.is_closing() or not can_relay(client):
            return None
        return self.dispatcher.pipe(), client

    def deliver_refusal(self, refusal: Refusal) -> None:
        if not self.active:
            self.late_refusal = refusal
            return
        if not self.received:
            self.keep_alive = False
        self.protocol.transport.write(refusal_bytes(refusal, self.keep_alive, self.bodiless))
        self._finish()

    def deliver_cut(self) -> None:
        self.response_complete = True
        self.protocol.running = None
        self.protocol.transport.abort()

    def pause_client(self) -> None:
        self.protocol.flow.pause_reading()

    def resume_client(self) -> None:
        if not self.ended:
            self.protocol.flow.resume_reading()

    def choke(self) -> None:
        """The client is slower than the worker: stop reading the worker."""
        if self.connection is not None:
            self.connection.pause()

    def unchoke(self) -> None:
        """The client takes more."""
        if self.connection is not None:
            self.connection.resume()

    def _adapted(self, head: ResponseHead) -> bytes:
        """A head that does not fit this client as it is, rewritten; the body's framing follows from it."""
        extra = [] if self.keep_alive else [b"connection: close"]
        if head.length is None and not head.chunked and not self.old:
            self.rechunked = True
            extra.append(b"transfer-encoding: chunked")
        elif head.chunked and self.old:
            self.scanner = ChunkScanner()
        return head.forwarded(extra, without=b"transfer-encoding" if self.old else b"")

    def _write_body(self, data: bytes, complete: bool) -> None:
        transport = self.protocol.transport
        if self.scanner is not None:
            content: list[bytes] = []
            self.scanner.feed(data, content)
            transport.writelines(content)
        elif not self.rechunked:
            transport.write(data)
        else:
            if data:
                transport.writelines((b"%x\r\n" % len(data), data, b"\r\n"))
            if complete:
                transport.write(b"0\r\n\r\n")

    def _finish(self) -> None:
        self.response_complete = True
        protocol = self.protocol
        protocol.running = None
        if not self.received:
            protocol.linger()
        elif not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()
