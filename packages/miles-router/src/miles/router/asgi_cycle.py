"""A request of the slow path as ASGI sees it: one task, one write for an answer that is known as a whole."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from starlette.types import ASGIApp, Message, Scope

from miles.router.exchange import JOIN_BYTES
from miles.router.framing import TOKEN, Header

if TYPE_CHECKING:
    from miles.router.asgi_head import PlainAsgiHead
    from miles.router.protocol import RouterProtocol

logger = logging.getLogger("uvicorn.error")  # where users of uvicorn look for faults of their middleware

_MAX_UNREAD_BYTES = 256 * 1024  # of a body that the application has not asked for, before the client has to wait
_FIELD = re.compile(TOKEN + rb": [^\x00-\x08\x0a-\x1f\x7f]*+\r\n")
_MAX_KNOWN_LINES = 1024
_MAX_KNOWN_BYTES = 256
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_ERROR_HEADERS = [
    (b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"21"), (b"connection", b"close"),
]  # fmt: skip


_known_lines: dict[Header, bytes] = {}  # fields of answers seen lately that do not concern the framing


def _read_line(name: bytes, value: bytes) -> bytes:
    """The line of a response's field, remembered."""
    line = _line(name.lower(), value)
    if len(line) <= _MAX_KNOWN_BYTES:
        if len(_known_lines) >= _MAX_KNOWN_LINES:
            _known_lines.clear()
        _known_lines[name, value] = line
    return line


def _line(name: bytes, value: bytes) -> bytes:
    line = b"%b: %b\r\n" % (name, value)
    if _FIELD.fullmatch(line) is None:
        raise RuntimeError(f"invalid response header {name!r}: {value!r}")
    return line


CYCLE = "miles.router.cycle"
"""The extension of a scope that names its AsgiCycle."""

WireRequest = tuple["PlainAsgiHead", bytes, int]
"""A plain head, the whole request as on the wire, and where its body begins."""


class Listener(Protocol):
    """Who wants to know at once that the client of a request has left."""

    def leave(self) -> None:
        """The client has left."""


class AsgiCycle:
    """A request that an ASGI application answers, and a cycle in uvicorn's pipeline.

    Attributes of the class are where each request begins.
    """

    disconnected = False
    response_complete = False
    _task: asyncio.Task[None] | None = None
    # The request: what the application has not got of its body, whether it knows that this was all.
    more_body = True
    _unread = 0
    _told = False
    _event: asyncio.Event | None = None
    _wire: WireRequest | None = None  # all of it as it came, until an application asks for it
    _wire_headers: list[Header]
    _listener: Listener | None = None
    # The answer: its head until it is written, how much of the body is missing.
    _started = _written = _chunked = False
    _head = b""
    _left: int | None = None

    def __init__(self, protocol: RouterProtocol, scope: Scope, keep_alive: bool, expects_continue: bool) -> None:
        self.protocol = protocol
        self.scope = scope
        scope["extensions"] = {CYCLE: self}
        self.keep_alive = keep_alive
        self._pieces: list[bytes] = []
        self._expects_continue = expects_continue
        self._silent = False  # whether the answer has no body, whatever its head says of one

    @property
    def message_event(self) -> AsgiCycle:
        """What uvicorn sets when the connection is lost."""
        return self

    def set(self) -> None:
        """Something that ``receive`` may wait for has happened."""
        if self._event is not None:
            self._event.set()
        if self.disconnected and self._listener is not None:
            self._listener.leave()

    def activate(self) -> None:
        """All earlier requests of the connection are answered."""
        protocol = self.protocol
        self._task = protocol.loop.create_task(self._run(protocol.app))
        protocol.tasks.add(self._task)

    def feed(self, data: bytes) -> None:
        """A piece of the request's body came."""
        if self.response_complete:
            return
        self._pieces.append(data)
        self._unread += len(data)
        if self._unread > _MAX_UNREAD_BYTES:
            self.protocol.flow.pause_reading()
        self.set()

    def feed_end(self) -> None:
        """The request is complete."""
        self.more_body = False
        self.set()

    def feed_wire(self, head: PlainAsgiHead, headers: list[Header], data: bytes, body_at: int) -> None:
        """The request, all of it, as on the wire."""
        self._wire = (head, data, body_at)
        self._wire_headers = headers
        self.more_body = False

    def untouched(self, scope: Scope) -> WireRequest | None:
        """The request as on the wire, for one who takes it from here.

        None when that is not known, when it was read, or when ``scope`` was changed.
        """
        wire = self._wire
        if wire is None or self.disconnected or not wire[0].is_that_of(scope, self._wire_headers):
            return None
        self._wire = None
        self._told = True
        return wire

    def listen(self, listener: Listener | None) -> None:
        """Tell ``listener`` when the client leaves: for an application that does not wait in ``receive``."""
        self._listener = listener
        if listener is not None and self.disconnected:
            listener.leave()

    async def receive(self) -> Message:
        """The ASGI callable: the body as far as it has come, then that the client left or got its answer."""
        protocol = self.protocol
        if self._expects_continue and not protocol.transport.is_closing():
            protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._expects_continue = False
        if protocol.flow.read_paused and not protocol.pipeline:
            protocol.flow.resume_reading()
        if self._wire is not None:
            _, data, body_at = self._wire
            self._pieces = [data[body_at:]]
            self._wire = None
        while not (
            self.disconnected or self.response_complete or self._pieces or (not self.more_body and not self._told)
        ):
            if self._event is None:
                self._event = asyncio.Event()
            self._event.clear()
            await self._event.wait()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        self._unread = 0
        self._told = not self.more_body
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        """The ASGI callable.  The head waits for the first part of the body, as ASGI wants it."""
        if self.protocol.flow.write_paused and not self.disconnected:
            await self.protocol.flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if self._started and kind == "http.response.body" and not self.response_complete:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        elif kind == "http.response.start" and not self._started:
            self._begin(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"ASGI message {kind!r} sent {self._stage}")

    @property
    def _stage(self) -> str:
        if self.response_complete:
            return "after the end of the answer"
        return f"where 'http.response.{'body' if self._started else 'start'}' was expected"

    @property
    def takes_wire(self) -> bool:
        """Whether ``pass_on`` is possible."""
        return not (self._started or self.disconnected or self.protocol.flow.write_paused)

    def pass_on(self, data: bytes) -> None:
        """Answer a plain request with a plain answer as on the wire, in place of ``send``."""
        self._started = self._written = True
        self.protocol.transport.write(data)
        self._finish()

    async def _run(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:  # whatever it is, it must cost this request only
            logger.error("Exception in ASGI application\n", exc_info=error)
            self._fail()
        else:
            if not self.response_complete and not self.disconnected:
                logger.error("ASGI callable returned without completing response.")
                self._fail()
        finally:
            assert self._task is not None
            self.protocol.tasks.discard(self._task)
            self._task = None
            self.scope = {}  # it names this cycle: without this both would wait for the garbage collector

    def _fail(self) -> None:
        """Say that the application is broken, or close in the middle of the answer."""
        if self._written or self.disconnected:
            self.protocol.transport.close()
            return
        self._begin(500, _ERROR_HEADERS)
        self._send_body(b"Internal Server Error", False)

    def _begin(self, status: int, headers: Iterable[Header]) -> None:
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        known = _known_lines.get
        length: int | None = None
        others: list[Header] = []
        for name, value in headers:
            if name == b"content-length":
                length = int(value)
            elif (line := known((name, value))) is not None:
                lines.append(line)
            elif (low := name.lower()) == b"content-length":
                length = int(value)
            elif low in (b"connection", b"transfer-encoding"):
                others.append((low, value))
            else:
                lines.append(_read_line(name, value))
        if length is not None:
            lines.append(b"content-length: %d\r\n" % length)
        self._silent = status in (204, 304) or self.scope["method"] == "HEAD"
        if others or length is None or not self.keep_alive or self._silent:
            lines += self._agree_on_framing(length, others)
        else:
            self._left = length
            self._chunked = False
        lines.append(b"\r\n")
        self._head = b"".join(lines)
        self._started = True
        self._expects_continue = False

    def _agree_on_framing(self, length: int | None, fields: list[Header]) -> list[bytes]:
        """Note how the end of the body is to be found; lines of ``fields`` and of what else the client has to know."""
        chunked = closes = False
        for name, value in fields:
            if name == b"transfer-encoding":
                chunked = chunked or value.lower() == b"chunked"
            elif b"close" in [option.strip() for option in value.lower().split(b",")]:
                closes = True
        if closes:
            self.keep_alive = False
        elif not self.keep_alive:
            fields.append((b"connection", b"close"))
        if self._silent:
            length = length or 0
        if self.scope["http_version"] == "1.0":  # knows no chunks: the end of the connection ends the body
            fields = [field for field in fields if field[0] != b"transfer-encoding"]
            chunked = False
        elif length is None and not chunked:
            chunked = True
            fields.append((b"transfer-encoding", b"chunked"))
        self._chunked = chunked
        self._left = None if chunked else length
        return [_line(name, value) for name, value in fields]

    def _send_body(self, body: bytes, more: bool) -> None:
        transport = self.protocol.transport
        head = self._head
        if not more and self._left == len(body) < JOIN_BYTES and not self._silent:
            transport.write(head + body)
        else:
            parts = [head] if self._silent else [head, *self._framed(body, more)]
            if len(body) < JOIN_BYTES:
                transport.write(b"".join(parts))
            else:
                transport.writelines(parts)
        self._head = b""
        self._written = True
        if not more:
            self._finish()

    def _framed(self, body: bytes, more: bool) -> list[bytes]:
        if self._chunked:
            parts = [b"%x\r\n" % len(body), body, b"\r\n"] if body else []
            return parts if more else [*parts, b"0\r\n\r\n"]
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError(f"response content {'longer' if self._left < 0 else 'shorter'} than Content-Length")
        return [body]

    def _finish(self) -> None:
        self.response_complete = True
        self.set()
        if not self.keep_alive:
            self.protocol.transport.close()
        self.protocol.on_response_complete()
