"""The slow path: the same exchange behind an ASGI interface, for what the fast path leaves alone."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from miles.router.dispatcher import Dispatcher
from miles.router.exchange import Exchange, Refusal
from miles.router.framing import ChunkScanner, Header, ResponseHead

_WATCH_AFTER_S = 0.02
_HIGH_WATER = 1024 * 1024  # bytes that wait for the ASGI server before the worker is not read any more


class AsgiProxy:
    """ASGI application that sends every request to a worker."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = AsgiExchange(self._dispatcher, scope)
        try:
            exchange.take(await receive())
            exchange.watch(receive)
            await exchange.answer(send)
        finally:
            exchange.stop_watching()
            exchange.client_gone()


class AsgiExchange(Exchange):
    """A proxied request of an ASGI server."""

    def __init__(self, dispatcher: Dispatcher, scope: Scope) -> None:
        headers: list[Header] = list(scope["headers"])
        lengths = [int(value) for name, value in headers if name == b"content-length"]
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        method = scope["method"].encode("ascii")
        super().__init__(dispatcher, method, target, headers, lengths[0] if lengths else None)
        self._messages: list[Message | None] = []  # None: the answer is broken
        self._queued_bytes = 0
        self._waiting: asyncio.Future[None] | None = None  # set while the answer is waited for
        self._open = asyncio.Event()
        self._open.set()
        self._scanner: ChunkScanner | None = None
        self._watcher: asyncio.TimerHandle | asyncio.Task[None] | None = None

    def take(self, message: Message) -> None:
        """A message of the client: a piece of the body, or that it has left."""
        if message["type"] == "http.disconnect":
            self.client_gone()
            self._push(None)
            return
        if message["body"]:
            self.feed(message["body"])
        if not message.get("more_body", False) and not self.received:
            self.feed_end()

    def watch(self, receive: Receive) -> None:
        """Take the rest of the body, and notice when the client leaves.

        That needs a task.  Many answers come before it would be of use, so a complete request gets it a little later.
        """
        if self.received:
            self._watcher = self.dispatcher.loop.call_later(_WATCH_AFTER_S, self._start_watching, receive)
        else:
            self._start_watching(receive)

    def stop_watching(self) -> None:
        """Listen to the client no more."""
        if self._watcher is not None:
            self._watcher.cancel()

    def _start_watching(self, receive: Receive) -> None:
        self._watcher = self.dispatcher.loop.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        while not self.ended:
            await self._open.wait()
            self.take(await receive())

    async def answer(self, send: Send) -> None:
        """Send the answer; returns in the middle of a broken one, which makes the server close the connection."""
        more = True
        while more:
            if not self._messages:
                self._waiting = self.dispatcher.loop.create_future()
                await self._waiting
            messages, self._messages = self._messages, []
            self._queued_bytes = 0
            for message in messages:
                if message is None:
                    return
                await send(message)
                more = message["type"] == "http.response.start" or message["more_body"]
            if self.connection is not None:
                self.connection.resume()

    def deliver_head(self, head: ResponseHead, data: bytes, body_at: int, complete: bool) -> None:
        self._scanner = ChunkScanner() if head.chunked else None
        headers = [field for field in head.headers() if field[0] != b"transfer-encoding"]
        self._push({"type": "http.response.start", "status": head.status, "headers": headers})
        self.deliver(data[body_at:], complete)

    def deliver(self, data: bytes, complete: bool) -> None:
        if self._scanner is not None:
            payload: list[bytes] = []
            self._scanner.feed(data, payload)
            data = b"".join(payload)
        if data or complete:
            self._push({"type": "http.response.body", "body": data, "more_body": not complete})
        self._queued_bytes += len(data)
        if self._queued_bytes > _HIGH_WATER and self.connection is not None:
            self.connection.pause()

    def deliver_refusal(self, refusal: Refusal) -> None:
        body = refusal.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if refusal.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % refusal.retry_after_s))
        self._push({"type": "http.response.start", "status": refusal.status, "headers": headers})
        self._push({"type": "http.response.body", "body": b"" if self.bodiless else body, "more_body": False})

    def deliver_cut(self) -> None:
        self._push(None)

    def pause_client(self) -> None:
        self._open.clear()

    def resume_client(self) -> None:
        self._open.set()

    def _push(self, message: dict[str, Any] | None) -> None:
        self._messages.append(message)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
