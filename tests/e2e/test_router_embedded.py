"""The router in front of embedded engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from router_conformance import Engines, Fleet, RouterConformance

from miles.core.ports import free_ports
from miles.core.process import ChildProcess
from miles.core.protocols.engine import EngineSpec
from miles.rollout.engines.embedded.launcher import EmbeddedEngine
from miles.rollout.engines.launched import LaunchedEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

START_DEADLINE_S = 60.0


def launch(checkpoint: str, count: int) -> list[LaunchedEngine]:
    launcher = EmbeddedEngine()
    specs = [EngineSpec(checkpoint, "127.0.0.1", port, index) for index, port in enumerate(free_ports(count))]
    engines = [launcher.launch(spec) for spec in specs]
    for engine in engines:
        engine.wait_ready(START_DEADLINE_S)
    return engines


@pytest.fixture(scope="module")
def engines(toy) -> Iterator[Engines]:
    running = launch(str(toy.checkpoint), 2)
    yield Engines((running[0].url, running[1].url), toy.checkpoint)
    for engine in running:
        engine.stop()


class TestEmbedded(RouterConformance):
    async def test_a_killed_engine_costs_no_request(self, fleet: Fleet, toy) -> None:
        (doomed,) = launch(str(toy.checkpoint), 1)
        await fleet.client.post("/add_worker", params={"url": doomed.url})
        await fleet.until(lambda status: all(worker["is_healthy"] for worker in status["workers"]))
        waiting = [asyncio.create_task(fleet.generate(max_new_tokens=200)) for _ in range(9)]
        await fleet.until(lambda status: status["in_flight"] == 9)
        process: ChildProcess = doomed.process
        process.stop(0.0)
        assert [len(answer["output_ids"]) for answer in await asyncio.gather(*waiting)] == [200] * 9
        assert (await fleet.status())["requests"]["retried"] >= 1
        await fleet.client.post("/remove_worker", params={"url": doomed.url})
