"""An HTTP server that behaves as a test says, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Request:
    """What a worker saw."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    raw_head: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return json.loads(self.body)


class Conversation:
    """A request at a worker, to be answered byte by byte."""

    def __init__(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.request = request
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes = b"{}", status: int = 200, *fields: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *fields]
        await self.send("\r\n".join([*lines, "\r\n"]).encode() + body)

    def reset(self) -> None:
        """Close as a killed process does."""
        self.writer.transport.abort()

    async def client_left(self) -> None:
        """Return when the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


Behaviour = Callable[[Conversation], Awaitable[None]]


def answers_after(release: asyncio.Event, body: bytes = b"{}") -> Behaviour:
    """Answer with ``body`` once ``release`` is set."""

    async def slow(conversation: Conversation) -> None:
        await release.wait()
        await conversation.answer(body)

    return slow


async def echo(conversation: Conversation) -> None:
    await conversation.answer(conversation.request.body or b"{}")


class Worker:
    """An HTTP server that records requests and answers as ``behaviour`` says."""

    def __init__(self, behaviour: Behaviour = echo) -> None:
        self.behaviour = behaviour
        self.requests: list[Request] = []
        self.aborted: list[Any] = []
        self.connections = 0
        self.health_status = 200
        self.hangs = False
        self.weight_version: str | None = None
        self.model_info: bytes | None = None
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def paths(self) -> list[str]:
        return [request.target for request in self.requests]

    async def start(self) -> Worker:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def kill(self) -> None:
        """End as a killed process: the port refuses, open connections are reset."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            self._server = None

    async def stop_listening(self) -> None:
        """Refuse new connections, keep the open ones."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while (request := await read_request(reader)) is not None:
                await self._handle(Conversation(request, reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _handle(self, conversation: Conversation) -> None:
        target = conversation.request.target
        if target in ("/health", "/model_info") and self.hangs:
            await conversation.client_left()
        elif target == "/health":
            await conversation.answer(b"", self.health_status)
        elif target == "/model_info":
            known = self.weight_version is not None
            info = self.model_info or json.dumps({"weight_version": self.weight_version}).encode()
            await conversation.answer(info, 200 if known else 404)
        elif target == "/abort_request" and "rid" in conversation.request.json():
            self.aborted.append(conversation.request.json()["rid"])
            await conversation.answer()
        else:
            self.requests.append(conversation.request)
            await self.behaviour(conversation)


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, headers = parse_head(head)
    method, target, _ = first.split(" ")
    names = dict(headers)
    body = b""
    if "content-length" in names:
        body = await reader.readexactly(int(names["content-length"]))
    elif names.get("transfer-encoding") == "chunked":
        body, _ = await read_chunks(reader)
    return Request(method, target, headers, body, head)


async def read_chunks(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Content and trailers."""
    content = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        content += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    trailers = b""
    while (line := await reader.readline()) != b"\r\n":
        if not line:
            raise asyncio.IncompleteReadError(trailers, None)
        trailers += line
    return content, trailers


def parse_head(head: bytes) -> tuple[str, list[tuple[str, str]]]:
    first, *lines = head.decode("latin-1")[:-4].split("\r\n")
    pairs = (line.split(":", 1) for line in lines)
    return first, [(name.lower(), value.strip()) for name, value in pairs]
