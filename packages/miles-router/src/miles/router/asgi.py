"""The slow path: the same exchange behind an ASGI interface, for what the fast path leaves alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from starlette.types import Message, Receive, Scope, Send

from miles.router.asgi_cycle import CYCLE, AsgiCycle, WireRequest
from miles.router.dispatcher import Dispatcher
from miles.router.exchange import Exchange
from miles.router.framing import ChunkScanner, Header, PlainAnswer, ResponseHead
from miles.router.plain import PlainHead, PlainRequest
from miles.router.refusal import Refusal
from miles.router.signals import Signal

_HIGH_WATER = 1024 * 1024  # bytes that wait for the ASGI server before the worker is not read any more
_MAX_SPARE = 256


class AsgiProxy:
    """ASGI application that sends every request to a worker."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._spare: list[PlainAsgiExchange] = []

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        cycle: AsgiCycle | None = scope.get("extensions", {}).get(CYCLE)
        own = getattr(receive, "__self__", None) is cycle
        if cycle is not None and own:
            request = cycle.untouched(scope)
            if request is not None:
                return self._serve_plain(request, cycle, send)
        return self._serve(scope, receive, send, cycle)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, cycle: AsgiCycle | None) -> None:
        exchange = AsgiExchange.of_scope(self._dispatcher, scope)
        try:
            while not (exchange.received or exchange.streaming or exchange.ended):
                exchange.take(await receive())
            if cycle is not None and exchange.received:
                cycle.listen(exchange)
            else:
                exchange.watch(receive)
            await exchange.answer(send)
        finally:
            exchange.stop_watching()
            exchange.client_gone()

    async def _serve_plain(self, request: WireRequest, cycle: AsgiCycle, send: Send) -> None:
        exchange = self._plain_exchange(*request)
        cycle.listen(exchange)
        if getattr(send, "__self__", None) is cycle:
            exchange.way_back = cycle
        try:
            exchange.begin()
            await exchange.answer(send)
        finally:
            exchange.client_gone()
        if exchange.whole and exchange.attempts == 1 and not exchange.tried and len(self._spare) < _MAX_SPARE:
            cycle.listen(None)
            self._spare.append(exchange)

    def _plain_exchange(self, head: PlainHead, data: bytes, body_at: int) -> PlainAsgiExchange:
        if not self._spare:
            return PlainAsgiExchange(self._dispatcher, head, data, body_at)
        exchange = self._spare.pop()
        exchange.renew(head, data, body_at)
        return exchange


class AsgiExchange(Exchange):
    """A proxied request of an ASGI server."""

    __slots__ = ("_arrival", "_messages", "_open", "_queued_bytes", "_scanner", "_watcher", "whole")

    def __init__(
        self, dispatcher: Dispatcher, method: bytes, target: bytes, headers: list[Header], declared_length: int | None
    ) -> None:
        Exchange.__init__(self, dispatcher, method, target, headers, declared_length)
        self._messages: list[Message | None] = []  # None: nothing more will come
        self._queued_bytes = 0
        self._arrival = Signal(dispatcher.loop)  # of messages
        self._open: asyncio.Event | None = None  # once the client has had to wait: whether it may go on
        self._scanner: ChunkScanner | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.whole = False  # whether the answer came in one piece

    @classmethod
    def of_scope(cls, dispatcher: Dispatcher, scope: Scope) -> AsgiExchange:
        """The exchange of the request that ``scope`` describes."""
        headers: list[Header] = scope["headers"]
        lengths = [int(value) for name, value in headers if name == b"content-length"]
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        method = scope["method"].encode("ascii")
        return cls(dispatcher, method, target, list(headers), lengths[0] if lengths else None)

    def begin(self) -> None:
        if self.streaming:
            self.pause_client()  # until a worker takes what follows
        super().begin()

    def take(self, message: Message) -> None:
        """A message of the client: a piece of the body, or that it has left."""
        if message["type"] == "http.disconnect":
            self.leave()
            return
        if message["body"]:
            self.feed(message["body"])
        if not message.get("more_body", False) and not self.received:
            self.feed_end()

    def leave(self) -> None:
        """The client has left."""
        self.client_gone()
        self.deliver_cut()

    def watch(self, receive: Receive) -> None:
        """Take the rest of the body, and notice when the client leaves."""
        self._watcher = self.dispatcher.loop.create_task(self._watch(receive))

    def stop_watching(self) -> None:
        """Listen to the client no more."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while not self.ended:
            if self._open is not None:
                await self._open.wait()
            message = await receive()
            if self.received and message["type"] != "http.disconnect":
                return  # it says the same again and again, and nothing of the client
            self.take(message)

    async def answer(self, send: Send) -> None:
        """Send the answer; of a broken one only what there is, which makes the server close the connection."""
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

    def on_whole(self, answer: PlainAnswer, data: bytes, body_at: int) -> None:
        self.status = answer.status
        self._answered()
        self.whole = True
        headers = answer.headers(len(data) - body_at)
        self._messages += (_start(answer.status, headers), _body(data[body_at:], False))
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


class PlainAsgiExchange(PlainRequest, AsgiExchange):
    """A plain request that no application has changed.  ``way_back``: where the answer may go as it is on the wire."""

    __slots__ = ("body_at", "plain", "way_back")

    def __init__(self, dispatcher: Dispatcher, head: PlainHead, data: bytes, body_at: int) -> None:
        super().__init__(dispatcher, head.method, head.target, [], len(data) - body_at)
        self.way_back: AsgiCycle | None = None
        self.take_request(head, data, body_at)

    def renew(self, head: PlainHead, data: bytes, body_at: int) -> None:
        self.whole = False
        self.way_back = None
        self._messages = []
        self._queued_bytes = 0
        super().renew(head, data, body_at)

    def on_whole(self, answer: PlainAnswer, data: bytes, body_at: int) -> None:
        cycle = self.way_back
        if cycle is None or not cycle.takes_wire:
            super().on_whole(answer, data, body_at)
            return
        self.status = answer.status
        self._answered()
        self.whole = True
        cycle.pass_on(data)
        self._messages.append(None)
        self._arrival.fire()


def _start(status: int, headers: list[Header]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def _body(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
