"""The fast path: a request goes from the client's connection to the worker's without a task, a future or ASGI.

A uvicorn protocol.  Uvicorn's parser and its pipeline of cycles stay in charge of the client's connection; a proxied
request takes the place of a request-response cycle in that pipeline.  Everything else goes to ASGI, by a cycle of ours.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, cast

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from miles.router.asgi_cycle import AsgiCycle
from miles.router.asgi_head import PlainAsgiHead, RequestLine, read_plain_asgi_head
from miles.router.framing import Header
from miles.router.hot_exchange import HotExchange
from miles.router.plain import PlainExchange, PlainHead, read_plain_head
from miles.router.refusal import Refusal, refusal_bytes
from miles.router.targets import needs_asgi

if TYPE_CHECKING:
    from miles.router.server import RouterServer

logger = logging.getLogger("miles.router")

_WRITE_HIGH_WATER = 1024 * 1024  # bytes kept for a slow client before its worker is not read any more
_LINGER_S = 5.0  # how long the rest of a refused request is read, so that the client gets to see the refusal
_NOTED = frozenset((b"content-length", b"transfer-encoding", b"expect"))


class RouterProtocol(HttpToolsProtocol):
    """A client's connection.  ``owner`` is set on a subclass made for each server."""

    owner: RouterServer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        settings = self.owner.settings
        self.dispatcher = self.owner.dispatcher
        self.running: HotExchange | None = None
        self.spare: PlainExchange | None = None  # may serve the next plain request
        self._hot = self.owner.hot
        self._scope: dict[str, Any] = {
            "type": "http", "server": self.server, "client": self.client, "scheme": self.scheme, "root_path": "",
        }  # fmt: skip
        self._line: RequestLine | None = None  # the last one, and what all scopes with it have in common
        self._known_scope = self._scope
        self._max_header_bytes = settings.max_header_bytes
        self._in_head = False
        self._parsing = False  # between the first byte of a request and its last, as the parser sees it
        self._head_bytes = 0  # at least those of the head, counted by pieces as they arrive
        self._declared_length: int | None = None
        self._transfer_coding = b""
        self._messages = 0  # requests begun
        self._deaf = False  # nothing more is parsed
        self._lingering = False
        self._waits: tuple[str, int] | None = None
        self._waits_since = 0.0
        transport.set_write_buffer_limits(high=_WRITE_HIGH_WATER)

    # What arrives.

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        cycle: Any = self.cycle
        try:
            if not self._parsing and (cycle is None or cycle.response_complete):
                plain = read_plain_head(data) if self._hot else read_plain_asgi_head(data)
                if plain is not None and self._serve_plain(data, *plain):
                    return
            self._head_bytes += len(data)
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # served without the upgrade; what follows is in no known protocol
            self._deaf = True
        except Exception as error:
            self._reject(_refusal_of(error))
        else:
            if self._in_head and self._head_bytes > self._max_header_bytes:
                self._reject(Refusal(431, f"request head above {self._max_header_bytes} bytes"))

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._declared_length = None
        self._transfer_coding = b""
        self._messages += 1
        self._in_head = self._parsing = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer
            return
        name = name.lower()
        value = value.rstrip(b" \t")  # no part of a value (RFC 9112, 5.1); the parser leaves it
        self.headers.append((name, value))
        if name in _NOTED:
            self._note(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._deaf:
            return
        parser = self.parser
        version = parser.get_http_version()
        method = parser.get_method()
        suspicious = self._transfer_coding or version != "1.1" or parser.should_upgrade()
        if suspicious or self._head_bytes > self._max_header_bytes:
            refusal = self._objection(version, method)
            if refusal is not None:
                self._reject(refusal)
                return
        keep_alive = version != "1.0" and parser.should_keep_alive()
        if self._hot and not needs_asgi(self.url):
            self._forward(method, version, keep_alive)
        else:
            self._hand_to_asgi(method, version, keep_alive)

    def on_body(self, body: bytes) -> None:
        cycle: Any = self.cycle
        if cycle.__class__ is HotExchange or not self._deaf:
            cycle.feed(body)

    def on_message_complete(self) -> None:
        self._parsing = False
        self._head_bytes = 0
        if self._deaf:
            return
        cycle: Any = self.cycle
        cycle.feed_end()

    # What uvicorn's pipeline asks for.

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self._lingering or self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            following: Any = self.pipeline.pop()[0]
            following.activate()

    # The connection.

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.running is not None:
            self.running.choke()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.running is not None:
            self.running.unchoke()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deaf = True
        super().connection_lost(exc)
        cycles: list[Any] = [self.running, self.cycle, *(cycle for cycle, _ in self.pipeline)]
        self.running = None
        for cycle in cycles:
            if isinstance(cycle, HotExchange):
                cycle.client_gone()

    def linger(self) -> None:
        """End the answer, but read on for a while: closing with unread bytes would take the answer from the client."""
        self._deaf = self._lingering = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def sweep(self, now: float) -> None:
        """Close the connection when the client has kept us waiting too long; called about once a second."""
        waits = self._waits_for()
        if waits != self._waits:
            self._waits = waits
            self._waits_since = now
        elif waits is not None and now - self._waits_since > self._patience_s(waits[0]):
            self._give_up(waits[0])

    # Inside.

    def _serve_plain(self, data: bytes, head: PlainHead | PlainAsgiHead, length: int, body_at: int) -> bool:
        """Serve ``data`` if it is one whole request; nothing has happened when the answer is False."""
        whole = len(data) - body_at == length
        if not whole or body_at > self._max_header_bytes or length > self.dispatcher.buffered_body_bytes:
            return False
        self._messages += 1
        if isinstance(head, PlainAsgiHead):
            headers = head.headers(length)
            cycle = AsgiCycle(self, self._asgi_scope(head.line, headers.copy()), True, False)
            cycle.feed_wire(head, headers, data, body_at)
            self._enqueue(cycle)
            return True
        exchange = self.spare
        if exchange is None:
            exchange = PlainExchange(self, head, data, body_at)
        else:
            self.spare = None
            exchange.renew(head, data, body_at)
        self.cycle = cast(RequestResponseCycle, exchange)
        self.running = exchange
        self.dispatcher.place(exchange)
        return True

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"content-length":
            self._declared_length = int(value)
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding":
            self._transfer_coding = self._transfer_coding + value.lower()

    def _objection(self, version: str, method: bytes) -> Refusal | None:
        """Why a request is not served, if there is a reason in its head."""
        limit = self._max_header_bytes
        if self._head_bytes > limit and self._head_size() > limit:
            return Refusal(431, f"request head above {limit} bytes")
        if self._transfer_coding not in (b"", b"chunked"):
            return Refusal(501, "only the transfer coding 'chunked' is supported")
        if version not in ("1.1", "1.0"):
            return Refusal(505, f"HTTP version {version} is not supported")
        if self.parser.should_upgrade() and (method == b"CONNECT" or self._transfer_coding or self._declared_length):
            return Refusal(501, "tunnels, and upgrades of requests with a body, are not supported")
        return None

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _forward(self, method: bytes, version: str, keep_alive: bool) -> None:
        exchange = HotExchange(self, method, self.url, self.headers, self._declared_length, keep_alive)
        exchange.old = version == "1.0"
        self._enqueue(exchange)

    def _hand_to_asgi(self, method: bytes, version: str, keep_alive: bool) -> None:
        try:
            line = RequestLine(method, self.url, version)
        except ValueError:
            self._reject(Refusal(400, "malformed request target"))
        else:
            self._enqueue(AsgiCycle(self, self._asgi_scope(line, self.headers), keep_alive, self.expect_100_continue))

    def _asgi_scope(self, line: RequestLine, headers: list[Header]) -> Scope:
        if line is not self._line:
            self._line = line
            self._known_scope = {**self._scope, **line.part}
        scope = self._known_scope.copy()
        scope["asgi"] = {"version": "3.0", "spec_version": "2.3"}
        scope["headers"] = headers
        scope["state"] = {}
        return scope

    def _enqueue(self, cycle: HotExchange | AsgiCycle) -> None:
        before: Any = self.cycle
        self.cycle = cast(RequestResponseCycle, cycle)
        if before is None or before.response_complete:
            cycle.activate()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _reject(self, refusal: Refusal) -> None:
        """Answer bytes that are not understood, and close."""
        if self._deaf:
            return
        self._deaf = True
        self._in_head = False
        cycle: Any = self.cycle
        if isinstance(cycle, HotExchange) and not cycle.ended and (not cycle.received or refusal.status == 500):
            cycle.keep_alive = False
            cycle.refuse(refusal)
            return
        if cycle is None or cycle.response_complete or not cycle.more_body:  # else ASGI has begun to serve and count it
            self.dispatcher.metrics.received += 1
            self.dispatcher.metrics.refused(refusal.status)
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            cycle.keep_alive = False  # the answer to an earlier request is under way: end after it
        elif not self.transport.is_closing():
            self.transport.write(refusal_bytes(refusal, keep_alive=False))
            self.linger()

    def _waits_for(self) -> tuple[str, int] | None:
        """What the client should do next, with a number that changes when it does something."""
        if self._lingering:
            return ("linger", 0)
        if self.flow.write_paused:
            return ("take", self.transport.get_write_buffer_size())
        if self._in_head:
            return ("head", self._messages)
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            return ("idle", self._messages)
        if cycle.more_body and not self.flow.read_paused:
            return ("body", self._head_bytes)
        return None

    def _patience_s(self, waits: str) -> float:
        settings = self.owner.settings
        return {
            "linger": _LINGER_S,
            "head": settings.header_timeout_s,
            "idle": settings.idle_timeout_s,
        }.get(waits, settings.stall_timeout_s)

    def _give_up(self, waits: str) -> None:
        if waits == "take":
            self.transport.abort()
        elif waits in ("idle", "linger"):
            self.transport.close()
        elif self.running is not None:
            self.running.refuse(Refusal(408, "the request's body did not arrive in time"))
        else:
            self._reject(Refusal(408, "the request did not arrive in time"))


def _refusal_of(error: Exception) -> Refusal:
    """The client's mistake, or one of ours, which must cost this request only."""
    if isinstance(error, httptools.HttpParserError) and not isinstance(error, httptools.HttpParserCallbackError):
        return Refusal(400, f"malformed request: {error}")
    logger.error("a request could not be handled", exc_info=error)
    return Refusal(500, "internal error of the router")
