"""Where an HTTP/1.1 response begins and ends, without decoding what lies between.

A worker's bytes are forwarded as they came; the router only has to know when the answer is complete, so that the
connection can serve the next request, and that nothing in its head breaks the client's framing (RFC 9112).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from miles.router.heads import HeadMemo

MAX_HEAD_BYTES = 256 * 1024
"""Longest response head that is accepted from a worker."""

_MAX_LINE_BYTES = 16 * 1024  # of a chunk-size line or a trailer field

_STATUS_LINE = rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n\0]*+)?\r\n"
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
"""Pattern of a field's name."""

_FIELD = TOKEN + rb":[^\r\n\0]*+\r\n"
_CONNECTION_NAMES = rb"connection|keep-alive|proxy-connection|te|upgrade"
_OTHER_FIELD = rb"(?!(?i:content-length|transfer-encoding|" + _CONNECTION_NAMES + rb"):)" + _FIELD

_HEAD = re.compile(_STATUS_LINE + rb"(?:" + _FIELD + rb")*+\r\n")
"""Any well-formed head."""

PLAIN_ANSWER = re.compile(
    _STATUS_LINE + rb"(?:" + _OTHER_FIELD + rb")*+"
    rb"(?i:content-length):[ \t]*+([0-9]{1,18})[ \t]*+\r\n"
    rb"(?:" + _OTHER_FIELD + rb")*+\r\n"
)  # fmt: skip
"""A head with one length and nothing that concerns the connection: nearly all of them, found in one pass."""

_CONNECTION_FIELD = re.compile(rb"\r\n(?:" + _CONNECTION_NAMES + rb"):")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n\0]*)?")

CONNECTION_FIELDS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade"))
"""Fields that concern one connection only and are never forwarded (RFC 9110, 7.6.1), framing aside."""

FRAMING_FIELDS = frozenset((b"content-length", b"transfer-encoding"))
"""Fields that say where the body ends; no ``Connection`` option can take them away."""

Header = tuple[bytes, bytes]
"""Name in lower case, value as received."""


class BadResponseError(Exception):
    """A worker's bytes are not an HTTP/1.1 response that can be forwarded."""


class ResponseHead:
    """The head of a worker's response.  ``length`` is None when chunks or the end of the connection end the body.

    ``plain``: ``raw`` may go to the client as it is.
    """

    __slots__ = ("chunked", "keep_alive", "length", "plain", "raw", "status")

    def __init__(
        self, raw: bytes, status: int, length: int | None, chunked: bool, keep_alive: bool, plain: bool
    ) -> None:
        self.raw = raw
        self.status = status
        self.length = length
        self.chunked = chunked
        self.keep_alive = keep_alive
        self.plain = plain

    def headers(self) -> list[Header]:
        """Fields to forward: all but those of the worker's connection."""
        fields = read_fields(self.raw[self.raw.index(b"\r\n") + 2 : -2])
        dropped = connection_options(fields)
        return [field for field in fields if field[0] not in dropped]

    def forwarded(self, extra: Sequence[bytes] = (), *, without: bytes = b"") -> bytes:
        """The head less the fields of the worker's connection and those called ``without``, plus ``extra`` lines."""
        status_line = b"HTTP/1.1" + self.raw[8 : self.raw.index(b"\r\n")]
        kept = [name + b": " + value for name, value in self.headers() if name != without]
        return b"\r\n".join([status_line, *kept, *extra]) + b"\r\n\r\n"


def read_fields(lines: bytes) -> list[Header]:
    """The fields of well-formed header lines, each with its end."""
    pairs = (line.partition(b":") for line in lines.split(b"\r\n")[:-1])
    return [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]


class PlainAnswer:
    """The head of an answer that may go to the client as it is, whatever its length."""

    __slots__ = ("_fields", "_head", "_length_at", "status")

    def __init__(self, status: int, match: re.Match[bytes]) -> None:
        self.status = status
        self._head = match.group()
        self._length_at = match.span(3)
        self._fields: tuple[list[Header], list[Header]] | None = None  # before and after the length

    def headers(self, length: int) -> list[Header]:
        """Its fields in the order in which they came, with this length."""
        if self._fields is None:
            self._fields = self._read_fields()
        earlier, later = self._fields
        return [*earlier, (b"content-length", b"%d" % length), *later]

    def _read_fields(self) -> tuple[list[Header], list[Header]]:
        head, (first, last) = self._head, self._length_at
        line_start, line_end = head.rindex(b"\r\n", 0, first) + 2, head.index(b"\r\n", last) + 2
        return read_fields(head[head.index(b"\r\n") + 2 : line_start]), read_fields(head[line_end:-2])


def _plain_answer(match: re.Match[bytes]) -> PlainAnswer | None:
    status = int(match[2])
    plain = match[1] == b"1" and status >= 200 and status not in (204, 304)
    return PlainAnswer(status, match) if plain else None


def plain_head(status: int, length: int, data: bytes, end: int) -> ResponseHead:
    """The head ``data[:end]`` that ``read_plain_answer`` understood."""
    return ResponseHead(data[:end], status, length, False, True, True)


read_plain_answer = HeadMemo(PLAIN_ANSWER, 3, _plain_answer).read
"""The head, the length of the body and the end of the head of an answer that is plain; None for others."""


def connection_options(headers: list[Header]) -> frozenset[bytes]:
    """Names of the fields that end at this connection, those nominated by ``Connection`` included."""
    nominated: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            nominated.update(option.strip().lower() for option in value.split(b","))
    return CONNECTION_FIELDS | (nominated - FRAMING_FIELDS)


def read_response_head(data: bytes, bodiless: bool = False) -> tuple[ResponseHead, int] | None:
    """The head that ``data`` begins with, and where it ends; None when it is not complete yet.

    ``bodiless``: the request was HEAD.  Raises BadResponseError for whatever a client could read differently: folded or
    bare lines, two lengths, a length beside chunks.
    """
    plain = None if bodiless else read_plain_answer(data)
    if plain is not None:
        answer, length, end = plain
        return plain_head(answer.status, length, data, end), end
    end = data.find(b"\r\n\r\n") + 4
    if end >= 4:
        return _parse_head(data[:end], bodiless), end
    if len(data) > MAX_HEAD_BYTES:
        raise BadResponseError(f"response head above {MAX_HEAD_BYTES} bytes")
    return None


def _parse_head(raw: bytes, bodiless: bool) -> ResponseHead:
    start = _HEAD.fullmatch(raw)
    if start is None:
        raise BadResponseError(f"malformed response head {raw[:64]!r}")
    status = int(start[2])
    low = raw.lower()
    plain = keep_alive = start[1] == b"1"
    if _CONNECTION_FIELD.search(low) is not None:
        plain = False
        keep_alive = keep_alive and b"close" not in _value(low, b"\r\nconnection:")
    length = _declared_length(low)
    chunked = b"\r\ntransfer-encoding:" in low and _is_chunked(low, length)
    if bodiless or status < 200 or status in (204, 304):
        return ResponseHead(raw, status, 0, False, keep_alive, plain)
    if length is None and not chunked:
        return ResponseHead(raw, status, None, False, False, False)
    return ResponseHead(raw, status, length, chunked, keep_alive, plain)


def _is_chunked(low: bytes, length: int | None) -> bool:
    coding = _value(low, b"\r\ntransfer-encoding:")
    if coding != b"chunked" or low.count(b"\r\ntransfer-encoding:") > 1:
        raise BadResponseError(f"transfer coding {coding!r}")
    if length is not None:
        raise BadResponseError("both Content-Length and Transfer-Encoding")
    return True


def _declared_length(low: bytes) -> int | None:
    at = low.find(b"\r\ncontent-length:")
    if at < 0:
        return None
    value = low[at + 17 : low.find(b"\r\n", at + 17)].strip(b" \t")
    if not value.isdigit() or len(value) > 18 or low.find(b"\r\ncontent-length:", at + 17) >= 0:
        raise BadResponseError(f"Content-Length {value!r}")
    return int(value)


def _value(low: bytes, name: bytes) -> bytes:
    """Value of the first field whose line begins with ``name``; empty without one."""
    at = low.find(name)
    return low[at + len(name) : low.find(b"\r\n", at + len(name))].strip(b" \t") if at >= 0 else b""


class ChunkScanner:
    """Finds the end of a chunked body as its bytes pass by."""

    __slots__ = ("_data_left", "_line", "_phase", "done")

    def __init__(self) -> None:
        self.done = False
        self._phase = "size"
        self._data_left = 0
        self._line = b""  # the part of an unfinished line that earlier bytes brought

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """How many bytes of ``data`` belong to the body: all until ``done``.  Content is appended to ``payload``."""
        at, end = 0, len(data)
        while at < end and not self.done:
            if self._phase == "data":
                taken = min(self._data_left, end - at)
                if payload is not None:
                    payload.append(data[at : at + taken])
                at += taken
                self._data_left -= taken
                if not self._data_left:
                    self._phase = "data end"
                continue
            newline = data.find(b"\n", at)
            if newline < 0:
                self._keep(data[at:])
                return end
            line = self._line + data[at : newline + 1]
            self._line = b""
            at = newline + 1
            self._read_line(line)
        return at

    def _keep(self, part: bytes) -> None:
        self._line += part
        if len(self._line) > _MAX_LINE_BYTES:
            raise BadResponseError("chunk-size line or trailer field too long")

    def _read_line(self, line: bytes) -> None:
        if line[-2:] != b"\r\n":
            raise BadResponseError("line in a chunked body without CR")
        content = line[:-2]
        if self._phase == "size":
            match = _CHUNK_SIZE.fullmatch(content)
            if match is None:
                raise BadResponseError(f"chunk size {content[:32]!r}")
            self._data_left = int(match[1], 16)
            self._phase = "data" if self._data_left else "trailer"
        elif self._phase == "data end":
            if content:
                raise BadResponseError("chunk longer than its size")
            self._phase = "size"
        elif not content:
            self.done = True
