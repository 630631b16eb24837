"""A client that sees every byte of its answers."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from scripted_worker import parse_head, read_chunks

DEADLINE_S = 20.0


@dataclass
class Response:
    """What a client saw."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    raw_head: bytes
    complete: bool = True
    trailers: bytes = b""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection to a router."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, target: str = "/generate", body: bytes = b'{"text": "hi"}', *fields: str) -> Response:
        await self.send(post(target, body, *fields))
        return await self.response()

    async def get(self, target: str, *fields: str) -> Response:
        await self.send("\r\n".join([f"GET {target} HTTP/1.1", "host: x", *fields, "\r\n"]).encode())
        return await self.response()

    async def response(self, *, bodiless: bool = False) -> Response:
        async with asyncio.timeout(DEADLINE_S):
            return await self._response(bodiless)

    async def _response(self, bodiless: bool) -> Response:
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, headers = parse_head(head)
        status = int(first.split(" ")[1])
        response = Response(status, headers, b"", head)
        names = dict(headers)
        try:
            if bodiless or status in (204, 304) or status < 200:
                return response
            if "content-length" in names:
                response.body = await self.reader.readexactly(int(names["content-length"]))
            elif names.get("transfer-encoding") == "chunked":
                response.body, response.trailers = await read_chunks(self.reader)
            else:
                response.body = await self.reader.read()
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            response.complete = False
        return response

    async def closed(self) -> bool:
        """Whether the router closes the connection, without another byte."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


def post(target: str = "/generate", body: bytes = b'{"text": "hi"}', *fields: str) -> bytes:
    lines = [f"POST {target} HTTP/1.1", "host: x", f"content-length: {len(body)}", *fields]
    return "\r\n".join([*lines, "\r\n"]).encode() + body
