"""The slow path: the same exchange behind an ASGI interface, for what the fast path leaves alone."""

from __future__ import annotations

import asyncio
import re

from starlette.types import Message, Receive, Scope, Send

from miles.router.dispatcher import Dispatcher
from miles.router.exchange import Exchange, Refusal
from miles.router.framing import PLAIN_ANSWER, ChunkScanner, Header, ResponseHead, read_fields
from miles.router.heads import HeadMemo
from miles.router.signals import Signal

_LOOKOUT_INTERVAL_S = 0.025
_HIGH_WATER = 1024 * 1024  # bytes that wait for the ASGI server before the worker is not read any more


class AsgiProxy:
    """ASGI application that sends every request to a worker."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._lookout = Lookout(dispatcher.loop)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = AsgiExchange(self._dispatcher, scope, receive)
        try:
            while not (exchange.received or exchange.streaming or exchange.ended):
                exchange.take(await receive())
            if exchange.received:
                self._lookout.add(exchange)
            else:
                exchange.watch()
            await exchange.answer(send)
        finally:
            self._lookout.discard(exchange)
            exchange.stop_watching()
            exchange.client_gone()


class Lookout:
    """Has requests watched that take longer.  Watching one needs a task; many answers come before that is of use."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._young: dict[AsgiExchange, None] = {}
        self._older: dict[AsgiExchange, None] = {}  # than one interval, at the next tick
        self._timer: asyncio.TimerHandle | None = None

    def add(self, exchange: AsgiExchange) -> None:
        """Watch ``exchange`` before long."""
        self._young[exchange] = None
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOKOUT_INTERVAL_S, self._tick)

    def discard(self, exchange: AsgiExchange) -> None:
        """``exchange`` is over."""
        if self._young.pop(exchange, exchange) is exchange:
            self._older.pop(exchange, None)

    def _tick(self) -> None:
        for exchange in self._older:
            exchange.watch()
        self._older, self._young = self._young, {}
        self._timer = self._loop.call_later(_LOOKOUT_INTERVAL_S, self._tick) if self._older else None


class AsgiExchange(Exchange):
    """A proxied request of an ASGI server."""

    __slots__ = ("_arrival", "_messages", "_open", "_queued_bytes", "_receive", "_scanner", "_watcher")

    def __init__(self, dispatcher: Dispatcher, scope: Scope, receive: Receive) -> None:
        headers: list[Header] = scope["headers"]
        length: int | None = None
        for name, value in headers:
            if name == b"content-length":
                length = int(value)
                break
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        super().__init__(dispatcher, scope["method"].encode("ascii"), target, list(headers), length)
        self._receive = receive
        self._messages: list[Message | None] = []  # None: the answer is broken
        self._queued_bytes = 0
        self._arrival = Signal(dispatcher.loop)  # of messages
        self._open: asyncio.Event | None = None  # once the client has had to wait: whether it may go on
        self._scanner: ChunkScanner | None = None
        self._watcher: asyncio.Task[None] | None = None

    def begin(self) -> None:
        if self.streaming:
            self.pause_client()  # until a worker takes what follows
        super().begin()

    def take(self, message: Message) -> None:
        """A message of the client: a piece of the body, or that it has left."""
        if message["type"] == "http.disconnect":
            self.client_gone()
            self.deliver_cut()
            return
        if message["body"]:
            self.feed(message["body"])
        if not message.get("more_body", False) and not self.received:
            self.feed_end()

    def watch(self) -> None:
        """Take the rest of the body, and notice when the client leaves."""
        self._watcher = self.dispatcher.loop.create_task(self._watch())

    def stop_watching(self) -> None:
        """Listen to the client no more."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def _watch(self) -> None:
        while not self.ended:
            if self._open is not None:
                await self._open.wait()
            self.take(await self._receive())

    async def answer(self, send: Send) -> None:
        """Send the answer; returns in the middle of a broken one, which makes the server close the connection."""
        more = True
        while more:
            if not self._messages:
                await self._arrival
                continue
            messages, self._messages = self._messages, []
            self._queued_bytes = 0
            for message in messages:
                if message is None:
                    return
                await send(message)
                more = message["type"] == "http.response.start" or message["more_body"]
            if self.connection is not None:
                self.connection.resume()

    def on_whole(self, status: int, data: bytes, body_at: int) -> None:
        known = _read_answer_fields(data)
        assert known is not None  # the connection found it plain
        (earlier, later), length, _ = known
        self.status = status
        self._answered()
        headers = [*earlier, (b"content-length", b"%d" % length), *later]
        self._messages += (_start(status, headers), _body(data[body_at:], False))
        self._arrival.fire()

    def deliver_head(self, head: ResponseHead, data: bytes, body_at: int, complete: bool) -> None:
        self._scanner = ChunkScanner() if head.chunked else None
        fields = [field for field in head.headers() if field[0] != b"transfer-encoding"]
        self._messages.append(_start(head.status, fields))
        self._deliver(data[body_at:], complete)

    def deliver(self, data: bytes, complete: bool) -> None:
        if data or complete:
            self._deliver(data, complete)

    def _deliver(self, data: bytes, complete: bool) -> None:
        """Send on, even nothing: the server keeps the head until it has seen a part of the body."""
        if self._scanner is not None:
            payload: list[bytes] = []
            self._scanner.feed(data, payload)
            data = b"".join(payload)
        self._messages.append(_body(data, not complete))
        self._queued_bytes += len(data)
        self._arrival.fire()
        if self._queued_bytes > _HIGH_WATER and self.connection is not None:
            self.connection.pause()

    def deliver_refusal(self, refusal: Refusal) -> None:
        body = refusal.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if refusal.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % refusal.retry_after_s))
        self._messages += (_start(refusal.status, headers), _body(b"" if self.bodiless else body, False))
        self._arrival.fire_soon()

    def deliver_cut(self) -> None:
        self._messages.append(None)
        self._arrival.fire_soon()

    def pause_client(self) -> None:
        if self._open is None:
            self._open = asyncio.Event()
        self._open.clear()

    def resume_client(self) -> None:
        if self._open is not None:
            self._open.set()


def _start(status: int, headers: list[Header]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def _body(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _fields_around_length(match: re.Match[bytes]) -> tuple[list[Header], list[Header]]:
    head, (first, last) = match.group(), match.span(3)
    line_start = head.rindex(b"\r\n", 0, first) + 2
    return read_fields(head[head.index(b"\r\n") + 2 : line_start]), read_fields(
        head[head.index(b"\r\n", last) + 2 : -2]
    )


_read_answer_fields = HeadMemo(PLAIN_ANSWER, 3, _fields_around_length).read
"""Fields before and after the length of an answer that ``read_plain_answer`` understood."""
