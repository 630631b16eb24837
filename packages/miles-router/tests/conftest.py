"""A worker that behaves as told, a router in front of it, and a client that sees every byte.  All on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

sys.path.insert(0, str(Path(__file__).parent))  # for chat_templates and speaker

from chat_templates import write_checkpoint
from router_process import Process

from miles.router.server import RouterServer
from miles.router.settings import Settings

DEADLINE_S = 20.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A warning is an error, that of something left open included."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("error"))
            # pytest-asyncio's newer way to choose a loop is not in the versions that we allow
            item.add_marker(pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:DeprecationWarning"))


@pytest.fixture(scope="session")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


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


@dataclass
class Router:
    """A running router."""

    server: RouterServer
    port: int
    task: asyncio.Task[None]
    listener: socket.socket
    clients: list[Client] = field(default_factory=list)

    @property
    def metrics(self) -> Any:
        return self.server.dispatcher.metrics

    def worker(self, worker: Worker) -> Any:
        return self.server.dispatcher.fleet.get(worker.url)

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20))
        self.clients.append(client)
        return client

    async def post(self, target: str = "/generate", body: bytes = b'{"text": "hi"}', *fields: str) -> Response:
        return await (await self.connect()).post(target, body, *fields)

    async def get(self, target: str, *fields: str) -> Response:
        return await (await self.connect()).get(target, *fields)

    async def until(self, condition: Callable[[], Any]) -> None:
        """Return when ``condition`` holds."""
        await until(condition)

    async def state(self, worker: Worker, state: str) -> None:
        """Return when ``worker`` is in ``state``."""
        await until(lambda: self.worker(worker) is not None and self.worker(worker).state == state)

    async def settled(self, received: int = 1) -> None:
        """Return when at least ``received`` requests came and all have ended; check that nothing is left of them."""
        await until(lambda: self.metrics.received >= received and not self.metrics.under_way)
        await until(lambda: not self.server.dispatcher.in_flight)
        self.assert_settled()

    def assert_settled(self) -> None:
        """Every request ended, every place is free, every counter adds up."""
        dispatcher = self.server.dispatcher
        assert self.metrics.under_way == 0
        assert dispatcher.in_flight == 0
        assert not dispatcher.waiting
        for worker in dispatcher.fleet:
            assert worker.in_flight == 0
            assert not worker.exchanges
        assert sum(self.metrics.durations) <= self.metrics.received

    async def stop(self) -> None:
        """End at once; the graceful way takes uvicorn some tenths of a second, and is tested elsewhere."""
        for client in self.clients:
            client.reset()
        self.task.cancel()
        _, unfinished = await asyncio.wait([self.task], timeout=2 * DEADLINE_S)
        self.listener.close()
        assert not unfinished, "the router did not end"


async def until(condition: Callable[[], Any], deadline_s: float = 2 * DEADLINE_S) -> None:
    """Return when ``condition`` holds."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  what is waited for knows nothing of tests
            await asyncio.sleep(0.005)


MakeWorker = Callable[..., Awaitable[Worker]]
MakeRouter = Callable[..., Awaitable[Router]]


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., Awaitable[None]]:
    return until


@pytest.fixture
async def make_worker() -> AsyncIterator[MakeWorker]:
    workers: list[Worker] = []

    async def make(behaviour: Behaviour = echo) -> Worker:
        workers.append(await Worker(behaviour).start())
        return workers[-1]

    yield make
    for worker in workers:
        await worker.kill()


@pytest.fixture
async def make_router() -> AsyncIterator[MakeRouter]:
    routers: list[Router] = []

    async def make(*workers: Worker, ready: bool = True, **settings: Any) -> Router:
        quick: dict[str, Any] = {"health_check_interval_s": 0.2, "health_check_timeout_s": 0.5, "shutdown_timeout_s": 5}
        server = RouterServer(Settings(worker=tuple(worker.url for worker in workers), **(quick | settings)))
        listener = socket.create_server(("127.0.0.1", 0), backlog=16384)
        router = Router(server, listener.getsockname()[1], asyncio.create_task(server.serve(listener)), listener)
        routers.append(router)
        await until(lambda: hasattr(server, "dispatcher"))
        if ready:
            await until(lambda: len(server.dispatcher.fleet.ready) == len(workers))
        return router

    yield make
    for router in routers:
        await router.stop()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a family, without weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda family: write_checkpoint(folder / family, family)


@pytest.fixture
async def run():
    started = []

    async def start(*arguments: str, port: int = 0) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "miles.router", "--port", str(port), *arguments, stdout=asyncio.subprocess.PIPE
        )
        started.append(process)
        line = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
        return Process(process, int(line.rsplit(":", 1)[1]))

    yield start
    for process in started:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), 20)
