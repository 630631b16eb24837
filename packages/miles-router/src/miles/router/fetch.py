"""Requests that the router makes itself: health checks, aborts, fan-out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from miles.router.framing import ChunkScanner, Header, PlainAnswer, ResponseHead, plain_head
from miles.router.upstream import UpstreamConnection
from miles.router.workers import Worker


class FetchError(Exception):
    """A worker gave no answer: unreachable, closed, late or garbled."""


@dataclass(frozen=True, slots=True)
class FetchedResponse:
    """A whole answer."""

    status: int
    headers: list[Header]
    body: bytes


class Assembly:
    """An answer that arrives in pieces."""

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self._pieces: list[bytes] = []

    def add(self, data: bytes, complete: bool) -> FetchedResponse | None:
        """The whole answer, when ``data`` is its last piece; chunked bodies are unwrapped."""
        self._pieces.append(data)
        if not complete or self.head is None:
            return None
        body = b"".join(self._pieces)
        if self.head.chunked:
            payload: list[bytes] = []
            ChunkScanner().feed(body, payload)
            body = b"".join(payload)
        return FetchedResponse(self.head.status, self.head.headers(), body)


class _Collector:
    """Puts one answer together."""

    bodiless = False
    uploaded = False  # never, so that the connection is not offered to others

    def __init__(self) -> None:
        self.response: asyncio.Future[FetchedResponse] = asyncio.get_running_loop().create_future()
        self._assembly = Assembly()

    def on_head(self, head: ResponseHead, data: bytes, body_at: int, complete: bool) -> None:
        self._assembly.head = head
        self.on_data(data[body_at:], complete)

    def on_whole(self, answer: PlainAnswer, data: bytes, body_at: int) -> None:
        self.on_head(plain_head(answer.status, len(data) - body_at, data, body_at), data, body_at, True)

    def on_data(self, data: bytes, complete: bool) -> None:
        whole = self._assembly.add(data, complete)
        if whole is not None and not self.response.done():
            self.response.set_result(whole)

    def way_out(self, last_bytes: int) -> None:
        """Nowhere: the answer is wanted here."""

    def on_lost(self, kind: str, reason: str) -> None:
        if not self.response.done():
            self.response.set_exception(FetchError(reason))

    def pause_upload(self) -> None:
        """The body is in memory already."""

    def resume_upload(self) -> None:
        """See ``pause_upload``."""


async def fetch(
    worker: Worker,
    method: str,
    target: str,
    *,
    headers: Sequence[Header] = (),
    body: bytes = b"",
    timeout_s: float | None,
) -> FetchedResponse:
    """Send one request to ``worker`` over a connection of its own; raises FetchError."""
    connection: UpstreamConnection | None = None
    try:
        async with asyncio.timeout(timeout_s):
            connection = await open_connection(worker)
            collector = _Collector()
            connection.begin(collector)
            lines = [b"%b: %b\r\n" % field for field in headers]
            length = b"content-length: %d\r\n" % len(body) if body or method != "GET" else b""
            head = b"%b %b HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n%b%b\r\n" % (
                method.encode("ascii"), target.encode("ascii"), worker.authority, b"".join(lines), length,
            )  # fmt: skip
            connection.transport.writelines((head, body))
            return await collector.response
    except TimeoutError:
        raise FetchError(f"no answer within {timeout_s} s") from None
    except OSError as error:
        raise FetchError(str(error)) from None
    finally:
        if connection is not None:
            connection.abandon()


async def open_connection(worker: Worker) -> UpstreamConnection:
    """Connect to ``worker``; raises OSError."""
    host, port = worker.address
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: UpstreamConnection(worker), host, port, ssl=worker.tls)
    return connection
