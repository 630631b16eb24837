"""The other ends of the router benchmark: workers that answer at once or late, clients, a naive proxy, a middleware.

python tools/bench/router_load.py workers PORT...
python tools/bench/router_load.py clients PORT CASE SECONDS   (CASE: fields of ``Case`` as JSON)
python tools/bench/router_load.py naive PORT WORKER...
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miles.router.middleware import RouterHandle

RID = re.compile(rb'"rid": ?"(\d+)-(\d+)"')


@dataclass(frozen=True)
class Case:
    """A load: ``connections`` clients, each with one request after the other."""

    connections: int
    request_bytes: int
    answer_bytes: int
    delay_ms: int = 0
    pause_s: float = 0.0
    """Clients read nothing for so long after each request."""


class Worker(asyncio.Protocol):
    """Answers a request whose ``rid`` is "SIZE-DELAY" with SIZE bytes after DELAY ms; others with a healthy ``{}``.

    The size is in the body because not every router passes query strings on.
    """

    def __init__(self) -> None:
        self.answers: dict[tuple[bytes, bytes], tuple[bytes, float]] = {}
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n") + 4) >= 4:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 : head.find(b"\r\n", at)]) if at >= 0 else 0
            if len(self.buffer) < end + length:
                return
            rid = RID.search(self.buffer, end, end + length)
            self.buffer = self.buffer[end + length :]
            self.answer(rid.group(1, 2) if rid else (b"2", b"0"))

    def answer(self, wanted: tuple[bytes, bytes]) -> None:
        if wanted not in self.answers:
            self.answers[wanted] = make_answer(int(wanted[0])), int(wanted[1]) / 1000
        answer, delay_s = self.answers[wanted]
        if delay_s:
            asyncio.get_running_loop().call_later(delay_s, self.transport.write, answer)
        else:
            self.transport.write(answer)


def make_answer(size: int) -> bytes:
    body = json.dumps({"text": "x" * max(0, size - 12)}).encode()
    head = f"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n"
    return head.encode() + body


class LoadClient(asyncio.Protocol):
    """One connection that sends its next request when the answer to the last one is complete."""

    def __init__(
        self, request: bytes, pause_s: float, deadline: float, latencies: list[float], errors: list[str]
    ) -> None:
        self.request = request
        self.pause_s = pause_s
        self.deadline = deadline
        self.latencies = latencies
        self.errors = errors
        self.left = -1
        self.head = b""
        self.finished = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.sent = time.perf_counter()
        self.left, self.head = -1, b""
        self.transport.write(self.request)
        if self.pause_s:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(self.pause_s, self.transport.resume_reading)

    def data_received(self, data: bytes) -> None:
        if self.left < 0:
            self.head += data
            end = self.head.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            low = self.head[:end].lower()
            if not low.startswith(b"http/1.1 200"):
                self.errors.append(low[:80].decode())
            at = low.find(b"content-length:")
            self.left = int(low[at + 15 : low.find(b"\r\n", at)]) - (len(self.head) - end)
        else:
            self.left -= len(data)
        if self.left == 0:
            now = time.perf_counter()
            self.latencies.append(now - self.sent)
            if now < self.deadline:
                self.ask()
            else:
                self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.left != 0:
            self.errors.append(f"connection lost: {exc}")
        if not self.finished.done():
            self.finished.set_result(None)


class Stamp:
    """Middleware that adds a field to every answer."""

    def __init__(self, app: ASGIApp, *, router: RouterHandle) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", b"1")]
            await send(message)

        await self.app(scope, receive, stamped)


def serve_workers(ports: list[int]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(Worker, "127.0.0.1", port, backlog=16_384) for port in ports]
        await asyncio.gather(*(server.serve_forever() for server in servers))

    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())


def run_load(port: int, case: Case, seconds: float) -> dict[str, Any]:
    """Drive ``port`` and report what the clients saw."""

    async def main() -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        latencies: list[float] = []
        errors: list[str] = []
        start = time.perf_counter()

        def make(number: int) -> LoadClient:
            return LoadClient(make_request(case, number), case.pause_s, start + seconds, latencies, errors)

        numbers = range(case.connections)
        connecting = [loop.create_connection(partial(make, number), "127.0.0.1", port) for number in numbers]
        clients = [(await connection)[1] for connection in connecting]
        await asyncio.gather(*(client.finished for client in clients))
        elapsed = time.perf_counter() - start
        return {"latencies": sorted(latencies), "errors": errors, "elapsed": elapsed}

    return asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())


def make_request(case: Case, number: int) -> bytes:
    """What client ``number`` asks; lengths differ, as those of prompts do."""
    input_ids = [11111] * (case.request_bytes // 7 + number % 32)
    body = json.dumps({"rid": f"{case.answer_bytes}-{case.delay_ms}", "input_ids": input_ids}).encode()
    fields = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return f"POST /generate HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body


def summary(seen: dict[str, Any]) -> dict[str, float]:
    latencies = seen["latencies"]
    if not latencies:
        return {"requests": 0, "rps": 0.0, "p50_ms": 0.0, "p99_ms": 0.0, "errors": len(seen["errors"])}
    return {
        "requests": len(latencies),
        "rps": len(latencies) / seen["elapsed"],
        "p50_ms": statistics.median(latencies) * 1e3,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
        "errors": len(seen["errors"]),
    }


def serve_naive(port: int, workers: list[str]) -> None:
    """The proxy one writes first: FastAPI, httpx, the whole body parsed."""
    import httpx  # only this system needs it

    in_flight = dict.fromkeys(workers, 0)
    client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=None)
    app = FastAPI()

    @app.post("/{path:path}")
    async def proxy(path: str, request: Request) -> JSONResponse:
        worker = min(in_flight, key=in_flight.__getitem__)
        in_flight[worker] += 1
        try:
            answer = await client.post(f"{worker}/{path}", json=await request.json())
            return JSONResponse(answer.json(), answer.status_code)
        finally:
            in_flight[worker] -= 1

    uvicorn.run(app, port=port, log_level="warning", access_log=False, backlog=16_384)


def allow_many_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    allow_many_connections()
    role, arguments = sys.argv[1], sys.argv[2:]
    if role == "workers":
        serve_workers([int(port) for port in arguments])
    elif role == "naive":
        serve_naive(int(arguments[0]), arguments[1:])
    else:
        seen = run_load(int(arguments[0]), Case(**json.loads(arguments[1])), float(arguments[2]))
        print(json.dumps(summary(seen)))


if __name__ == "__main__":
    main()
