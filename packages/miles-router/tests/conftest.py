"""A worker that behaves as told, a router in front of it, and a client that sees every byte.  All on real sockets."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one

from chat_templates import write_checkpoint
from router_process import Process
from scripted_worker import Behaviour, Worker, echo
from wire_client import DEADLINE_S, Client, Response

from miles.router.middleware import RouterHandle
from miles.router.server import RouterServer
from miles.router.settings import Settings


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


@pytest.fixture(params=["auto", "off"], ids=["fast", "asgi"])
def path(request: pytest.FixtureRequest) -> str:
    """``--hot-path``: both ways through the router."""
    value: str = request.param
    return value


Act = Callable[[ASGIApp, Scope, Receive, Send], Awaitable[None]]


@pytest.fixture
def middleware_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[Act], str]:
    """The name of a middleware that does what a function of the application and a call says."""

    def name(act: Act) -> str:
        def make(app: ASGIApp, *, router: RouterHandle) -> ASGIApp:
            return partial(act, app)

        monkeypatch.setitem(sys.modules, "middleware_that", SimpleNamespace(make=make))
        return "middleware_that:make"

    return name


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
