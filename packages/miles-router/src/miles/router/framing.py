"""Where an HTTP/1.1 response begins and ends, without decoding what lies between.

A worker's bytes are forwarded as they came; the router only has to know when the answer is complete, so that the
connection can serve the next request, and that nothing in its head breaks the client's framing (RFC 9112).
"""

from __future__ import annotations

import re

MAX_HEAD_BYTES = 256 * 1024
"""Longest response head that is accepted from a worker."""

_MAX_LINE_BYTES = 16 * 1024  # of a chunk-size line or a trailer field

_HEAD = re.compile(
    rb"HTTP/1\.[01] [1-5][0-9][0-9](?: [^\r\n\0]*)?\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*\r\n)*\r\n"
)
_CONNECTION_FIELD = re.compile(rb"\r\n(?:connection|keep-alive|proxy-connection|te|upgrade):")
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
    """The head of a worker's response.  ``length`` is None when chunks or the end of the connection end the body."""

    __slots__ = ("chunked", "keep_alive", "length", "plain", "raw", "status")

    def __init__(
        self, raw: bytes, status: int, *, length: int | None, chunked: bool, keep_alive: bool, plain: bool
    ) -> None:
        self.raw = raw
        self.status = status
        self.length = length
        self.chunked = chunked
        self.keep_alive = keep_alive
        self.plain = plain
        """Whether ``raw`` may go to the client as it is."""

    def headers(self) -> list[Header]:
        """Fields to forward: all but those of the worker's connection."""
        fields = []
        for line in self.raw[:-4].split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            fields.append((name.lower(), value.strip(b" \t")))
        named = connection_options(fields)
        return [field for field in fields if field[0] not in named]

    def forwarded(self, *extra: bytes) -> bytes:
        """The head with fields of the worker's connection removed and ``extra`` lines added."""
        status_line = self.raw[: self.raw.index(b"\r\n")]
        lines = [status_line, *(name + b": " + value for name, value in self.headers()), *extra]
        return b"\r\n".join(lines) + b"\r\n\r\n"


def connection_options(headers: list[Header]) -> frozenset[bytes]:
    """Names of the fields that end at this connection, those nominated by ``Connection`` included."""
    nominated: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            nominated.update(option.strip().lower() for option in value.split(b","))
    return CONNECTION_FIELDS | (nominated - FRAMING_FIELDS) if nominated else CONNECTION_FIELDS


def parse_response_head(raw: bytes, *, bodiless: bool = False) -> ResponseHead:
    """Parse ``raw``, which runs through the blank line.  ``bodiless``: the request was HEAD.

    Raises BadResponseError for whatever a client could read differently: folded or bare lines, two lengths, a length
    beside chunks.
    """
    if _HEAD.fullmatch(raw) is None:
        raise BadResponseError(f"malformed response head {raw[:64]!r}")
    status = int(raw[9:12])
    low = raw.lower()
    keep_alive = raw[7:8] == b"1"
    plain = keep_alive and _CONNECTION_FIELD.search(low) is None
    if not plain and (at := low.find(b"\r\nconnection:")) >= 0:
        keep_alive = keep_alive and b"close" not in low[at + 13 : low.index(b"\r\n", at + 2)]
    chunked = _is_chunked(low)
    length = _declared_length(low)
    if chunked and length is not None:
        raise BadResponseError("both Content-Length and Transfer-Encoding")
    if bodiless or status < 200 or status in (204, 304):
        return ResponseHead(raw, status, length=0, chunked=False, keep_alive=keep_alive, plain=plain)
    delimited = chunked or length is not None
    keep_alive, plain = keep_alive and delimited, plain and delimited
    return ResponseHead(raw, status, length=length, chunked=chunked, keep_alive=keep_alive, plain=plain)


def _is_chunked(low: bytes) -> bool:
    at = low.find(b"\r\ntransfer-encoding:")
    if at < 0:
        return False
    coding = low[at + 20 : low.index(b"\r\n", at + 2)].strip(b" \t")
    if coding != b"chunked" or low.find(b"\r\ntransfer-encoding:", at + 2) >= 0:
        raise BadResponseError(f"transfer coding {coding!r}")
    return True


def _declared_length(low: bytes) -> int | None:
    at = low.find(b"\r\ncontent-length:")
    if at < 0:
        return None
    value = low[at + 17 : low.index(b"\r\n", at + 2)].strip(b" \t")
    if not value.isdigit() or len(value) > 18 or low.find(b"\r\ncontent-length:", at + 2) >= 0:
        raise BadResponseError(f"Content-Length {value!r}")
    return int(value)


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
