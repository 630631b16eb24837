"""A request of the slow path as ASGI sees it: one task, one write for an answer that is known as a whole."""

from __future__ import annotations

import asyncio
import logging
import re
import urllib.parse
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httptools
from starlette.types import ASGIApp, Message, Scope

from miles.router.exchange import JOIN_BYTES
from miles.router.framing import TOKEN, Header, read_fields
from miles.router.heads import HeadMemo
from miles.router.plain import PLAIN_REQUEST

if TYPE_CHECKING:
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


class RequestLine:
    """Method and target as a scope has them.  Raises ValueError for a target without a path."""

    __slots__ = ("part",)

    def __init__(self, method: bytes, target: bytes, version: str) -> None:
        try:
            url = httptools.parse_url(target)
        except httptools.HttpParserInvalidURLError as error:
            raise ValueError(str(error)) from None
        if url.path is None:
            raise ValueError("no path")
        self.part: dict[str, Any] = {
            "http_version": version,
            "method": method.decode("ascii"),
            "path": urllib.parse.unquote(url.path.decode("ascii")),
            "raw_path": url.path,
            "query_string": url.query or b"",
        }


class PlainAsgiHead:
    """A plain head as a scope has it: the same for all requests but for the length."""

    __slots__ = ("earlier", "later", "line")

    def __init__(self, match: re.Match[bytes]) -> None:
        head, length_at = match.group(), match.start(4)
        self.line = RequestLine(match[1], match[2], "1.1")
        self.earlier = read_fields(head[head.index(b"\r\n") + 2 : head.rindex(b"\r\n", 0, length_at) + 2])
        self.later = read_fields(match[5])

    def headers(self, length: int) -> list[Header]:
        """Fields in the order in which they came."""
        return [*self.earlier, (b"content-length", b"%d" % length), *self.later]


read_plain_asgi_head = HeadMemo(PLAIN_REQUEST, 4, PlainAsgiHead).read
"""Meaning, length and end of the plain head that bytes begin with; None for others."""


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


class AsgiCycle:
    """A request that an ASGI application answers, and a cycle in uvicorn's pipeline."""

    __slots__ = (
        "_chunked", "_event", "_expects_continue", "_head", "_left", "_pieces", "_silent", "_started", "_task",
        "_told", "_unread", "_written", "disconnected", "keep_alive", "more_body", "protocol", "response_complete",
        "scope",
    )  # fmt: skip

    def __init__(self, protocol: RouterProtocol, scope: Scope, keep_alive: bool, expects_continue: bool) -> None:
        self.protocol = protocol
        self.scope = scope
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self._task: asyncio.Task[None] | None = None
        # The request: pieces of its body that the application has not got, whether it knows that those were all.
        self.more_body = True
        self._expects_continue = expects_continue
        self._pieces: list[bytes] = []
        self._unread = 0
        self._told = False
        self._event: asyncio.Event | None = None
        # The answer: its head until it is written, how much of the body is missing.
        self._silent: bool = scope["method"] == "HEAD"
        self._started = self._written = self._chunked = False
        self._head = b""
        self._left: int | None = None

    @property
    def message_event(self) -> AsgiCycle:
        """What uvicorn sets when the connection is lost."""
        return self

    def set(self) -> None:
        """Something that ``receive`` may wait for has happened."""
        if self._event is not None:
            self._event.set()

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

    async def receive(self) -> Message:
        """The ASGI callable: the body as far as it has come, then that the client left or got its answer."""
        protocol = self.protocol
        if self._expects_continue and not protocol.transport.is_closing():
            protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._expects_continue = False
        if protocol.flow.read_paused and not protocol.pipeline:
            protocol.flow.resume_reading()
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
        flow = self.protocol.flow
        if flow.write_paused and not self.disconnected:
            await flow.drain()
        if self.disconnected:
            return
        expected = "http.response.body" if self._started else "http.response.start"
        if message["type"] != expected or self.response_complete:
            at = "after the end of the answer" if self.response_complete else f"where {expected!r} was expected"
            raise RuntimeError(f"ASGI message {message['type']!r} sent {at}")
        if self._started:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            self._begin(message["status"], message.get("headers", ()))

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

    def _fail(self) -> None:
        """Say that the application is broken, or close in the middle of the answer."""
        if self._written or self.disconnected:
            self.protocol.transport.close()
            return
        self._begin(500, _ERROR_HEADERS)
        self._send_body(b"Internal Server Error", False)

    def _begin(self, status: int, headers: Iterable[Header]) -> None:
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        length: int | None = None
        others: list[Header] = []
        for name, value in headers:
            line = _known_lines.get((name, value))
            if line is not None:
                lines.append(line)
            elif (low := name.lower()) == b"content-length":
                length = int(value)
                lines.append(b"content-length: %d\r\n" % length)
            elif low in (b"connection", b"transfer-encoding"):
                others.append((low, value))
            else:
                lines.append(_read_line(name, value))
        if others or length is None or not self.keep_alive or self._silent:
            lines += self._agree_on_framing(status, length, others)
        else:
            self._left = length
            self._chunked = False
        lines.append(b"\r\n")
        self._head = b"".join(lines)
        self._started = True
        self._expects_continue = False

    def _agree_on_framing(self, status: int, length: int | None, fields: list[Header]) -> list[bytes]:
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
        if self._silent or status in (204, 304):
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
