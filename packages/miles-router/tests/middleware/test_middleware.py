"""Middleware around the router: order, what it sees, what it may do, and what goes wrong."""

from __future__ import annotations

import json

import pytest

from miles.core.errors import ConfigError, PluginError
from miles.router.inner import RefusedError
from miles.router.server import RouterServer
from miles.router.settings import Settings

HERE = __name__


class Stamp:
    """Adds its name to a header of the answer, on the way out."""

    name = b"?"

    def __init__(self, app, *, router):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def stamped(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", self.name)]
            await send(message)

        await self.app(scope, receive, stamped)


class First(Stamp):
    name = b"first"


class Second(Stamp):
    name = b"second"


class Echo:
    """Answers what it knows of the router, and asks a worker something of its own."""

    def __init__(self, app, *, router):
        self.app = app
        self.router = router

    async def __call__(self, scope, receive, send):
        if scope["path"] != "/echo":
            await self.app(scope, receive, send)
            return
        worker = self.router.workers[0]
        try:
            status = (await self.router.ask("POST", "/own", [(b"x-own", b"1")], b"{}")).status
        except RefusedError as error:
            status = error.refusal.status
        known = {
            "url": worker.url,
            "state": worker.state,
            "in_flight": worker.in_flight,
            "version": self.router.weight_version,
            "policy": self.router.settings.policy,
            "status": status,
        }
        body = json.dumps(known).encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class NeedsTokenizer:
    def __init__(self, app, *, router):
        router.tokenizer  # noqa: B018


NOT_A_CLASS = 3


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This module by a name that dotted paths can name."""
    import sys

    monkeypatch.setitem(sys.modules, "middleware_of_this_test", sys.modules[HERE])


def dotted(*classes):
    return tuple(f"middleware_of_this_test:{one.__name__}" for one in classes)


async def test_first_named_is_outermost(make_worker, make_router):
    router = await make_router(await make_worker(), middleware=dotted(First, Second))
    answer = await router.post()
    assert [value for name, value in answer.headers if name == "x-stamp"] == ["second", "first"]


async def test_middleware_sees_the_control_plane_too(make_worker, make_router):
    router = await make_router(await make_worker(), middleware=dotted(First))
    assert (await router.get("/health")).header("x-stamp") == "first"


async def test_without_middleware_the_fast_path_is_taken(make_worker, make_router):
    worker = await make_worker()
    assert (await make_router(worker)).server.hot
    assert not (await make_router(worker, middleware=dotted(First))).server.hot


async def test_middleware_knows_the_router_and_can_ask_workers(make_worker, make_router):
    worker = await make_worker()
    worker.weight_version = "4"
    router = await make_router(worker, middleware=dotted(Echo))
    answer = await router.get("/echo")
    assert answer.json() == {
        "url": worker.url, "state": "healthy", "in_flight": 0, "version": "4", "policy": "least_loaded", "status": 200,
    }  # fmt: skip
    assert worker.paths == ["/own"]
    assert worker.requests[0].header("x-own") == "1"
    await router.settled()


async def test_middleware_learns_why_it_gets_no_answer(make_worker, make_router, until):
    worker = await make_worker()
    router = await make_router(worker, middleware=dotted(Echo), queue_timeout_s=0.2)
    await worker.kill()
    await router.state(worker, "quarantined")
    assert (await router.get("/echo")).json()["status"] == 503


async def test_a_middleware_that_needs_a_tokenizer_says_so(make_worker):
    server = RouterServer(Settings(middleware=dotted(NeedsTokenizer)))
    with pytest.raises(ConfigError, match="a middleware needs --tokenizer DIR"):
        await server.serve(None)


def test_unknown_middleware_is_named():
    with pytest.raises(PluginError, match=r"--middleware radix_cash: .*radix_cache"):
        RouterServer(Settings(middleware=("radix_cash",)))


def test_what_is_no_class_is_named():
    with pytest.raises(PluginError, match="expected Middleware"):
        RouterServer(Settings(middleware=("middleware_of_this_test:NOT_A_CLASS",)))
