"""Requests of the form that most clients send, read in one pass and forwarded with little more than a copy."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from miles.router.exchange import JOIN_BYTES, Exchange
from miles.router.framing import TOKEN, PlainAnswer
from miles.router.heads import HeadMemo
from miles.router.hot_exchange import HotExchange
from miles.router.targets import needs_asgi

if TYPE_CHECKING:
    from miles.router.protocol import RouterProtocol
    from miles.router.upstream import UpstreamConnection

_VALUE = rb":[^\x00-\x08\x0a-\x1f\x7f]*+\r\n"
_FOR_ROUTER = rb"connection|content-length|expect|host|keep-alive|proxy-connection|te|trailer|transfer-encoding|upgrade"
_PASSED = rb"(?!(?i:" + _FOR_ROUTER + rb"):)" + TOKEN + _VALUE
_PERSISTENT = rb"(?i:connection):[ \t]*+(?i:keep-alive)[ \t]*+\r\n"

PLAIN_REQUEST = re.compile(
    rb"(POST|PUT|PATCH|GET|DELETE|OPTIONS) (/[!\"$-~]*+) HTTP/1\.1\r\n(?i:host)" + _VALUE +
    rb"((?:" + _PASSED + rb"|" + _PERSISTENT + rb")*+)"
    rb"(?i:content-length):[ \t]*+([0-9]{1,18})[ \t]*+\r\n"
    rb"((?:" + _PASSED + rb")*+)\r\n"
)  # fmt: skip
"""The head of a request with a length, on a connection that stays.

Groups: method, target, fields before the length, the length, fields after it.  Anything else is left to a parser.
"""


class PlainHead:
    """What is sent of such a head: ``front``, the worker's name, ``fields``, the client's bytes from ``rest_at`` on."""

    __slots__ = ("fields", "front", "later_fields", "method", "rest_at", "target")

    def __init__(self, match: re.Match[bytes]) -> None:
        self.method, self.target, earlier, _, self.later_fields = match.groups()
        self.front = b"%b %b HTTP/1.1\r\nhost: " % (self.method, self.target)
        passed = [line for line in earlier.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        self.fields = b"\r\n%bcontent-length: " % b"\r\n".join(passed)
        self.rest_at = match.start(4)


def _meaning(match: re.Match[bytes]) -> PlainHead | None:
    return None if needs_asgi(match[2]) else PlainHead(match)


read_plain_head = HeadMemo(PLAIN_REQUEST, 4, _meaning).read
"""Meaning, length and end of the head that bytes begin with; None unless it is plain and its target a worker's."""


class PlainRequest(Exchange):
    """The part of an exchange that knows its request: plain, in one piece, ``body[0]`` as it was on the wire.

    When all went well at the first attempt, ``renew`` makes it the exchange of another request.
    """

    if TYPE_CHECKING:  # slots of the subclasses: of two bases only one can have them
        plain: PlainHead
        body_at: int
    else:
        __slots__ = ()

    def renew(self, head: PlainHead, data: bytes, body_at: int) -> None:
        """Become the exchange of another request."""
        dispatcher = self.dispatcher
        dispatcher.metrics.received += 1
        self.start = dispatcher.loop.time()
        self.method = head.method
        self.target = head.target
        self.attempts = 0
        self.headers = []
        self.started = self.ended = False
        self.take_request(head, data, body_at)

    def take_request(self, head: PlainHead, data: bytes, body_at: int) -> None:
        """``data`` is the whole request; ``begin`` can follow."""
        self.received = self.uploaded = True
        self.plain = head
        self.body = [data]
        self.body_at = body_at
        self.body_size = self.declared_length = len(data) - body_at

    def header(self, name: bytes) -> bytes | None:
        if not self.headers:
            lines = self.plain.fields.split(b"\r\n")[1:-1] + self.plain.later_fields.split(b"\r\n")[:-1]
            self.headers = [(key.lower(), value) for key, _, value in (line.partition(b":") for line in lines)]
        return super().header(name)

    def body_start(self) -> bytes:
        return self.body[0][self.body_at :] if self.body else b""

    def _send(self, connection: UpstreamConnection) -> None:
        head, data = self.plain, self.body[0]
        authority = connection.worker.authority
        if len(data) < JOIN_BYTES:
            connection.transport.write(b"".join((head.front, authority, head.fields, data[head.rest_at :])))
        else:
            rest = memoryview(data)[head.rest_at :]
            connection.transport.writelines((head.front + authority + head.fields, rest))


class PlainExchange(PlainRequest, HotExchange):
    """A plain request on the fast path.  A connection uses the same one again for its next request."""

    __slots__ = ("body_at", "plain")

    def __init__(self, protocol: RouterProtocol, head: PlainHead, data: bytes, body_at: int) -> None:
        super().__init__(protocol, head.method, head.target, [], len(data) - body_at, True)
        self.active = True
        self.take_request(head, data, body_at)

    def renew(self, head: PlainHead, data: bytes, body_at: int) -> None:
        super().renew(head, data, body_at)
        self.response_complete = False

    def on_whole(self, answer: PlainAnswer, data: bytes, body_at: int) -> None:
        super().on_whole(answer, data, body_at)
        if self.attempts == 1 and not self.tried:
            self.protocol.spare = self
