"""Who is told which engines serve."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from served_app import ServedApp

from miles.core.config import Config
from miles.core.protocols.engine import EngineSpec
from miles.rollout.front import Front, num_answering, part_of


class Listener(ServedApp):
    """A router or a decode server: remembers what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []
        for path in ("/add_worker", "/remove_worker"):
            self.app.router.add_post(path, self._worker)
        self.app.router.add_post("/prefill_servers", self._servers)

    async def _worker(self, request: web.Request) -> web.Response:
        self.told.append((request.path, request.query["url"]))
        return web.Response()

    async def _servers(self, request: web.Request) -> web.Response:
        self.told.append([(server["url"], server["port"]) for server in (await request.json())["servers"]])
        return web.Response()


@pytest.fixture
def router():
    with Listener() as router:
        yield router


@pytest.fixture
def decode():
    with Listener() as decode:
        yield decode


def test_the_first_engines_prefill_and_the_others_answer():
    config = Config.of(prefill_num_servers=1, rollout_num_engines=3)
    assert [part_of(config, index) for index in range(4)] == ["prefill", "decode", "decode", "whole"]
    assert num_answering(config) == 2
    assert part_of(Config.of(rollout_num_engines=3), 0) == "whole"


def test_the_router_knows_decode_servers_which_know_prefill_servers(router, decode):
    front = Front(lambda: router.url)
    first, second = "http://first:1", "http://second:1"
    front.know(first, EngineSpec("model", "first", 1, part="prefill", bootstrap_port=5))
    front.know(second, EngineSpec("model", "second", 1, part="prefill", bootstrap_port=6))
    front.know(decode.url, EngineSpec("model", "127.0.0.1", 1, part="decode"))
    front.open(first)
    front.open(decode.url)
    front.open(second)
    front.close(first)
    front.close(decode.url)
    assert decode.told == [[(first, 5)], [(first, 5), (second, 6)], [(second, 6)]]
    assert router.told == [("/add_worker", decode.url), ("/remove_worker", decode.url)]


def test_a_decode_server_that_hears_nothing_is_no_fault_of_a_prefill_server(router):
    front = Front(lambda: router.url)
    with Listener() as lost:
        front.know(lost.url, EngineSpec("model", "127.0.0.1", 1, part="decode"))
        front.open(lost.url)
    front.know("http://first:1", EngineSpec("model", "first", 1, part="prefill"))
    front.open("http://first:1")
    front.close("http://first:1")


def test_engines_that_nobody_launched_are_the_routers(router):
    Front(lambda: router.url).open("http://external:1")
    assert router.told == [("/add_worker", "http://external:1")]
