"""Overload: the queue, its bounds, and limits of requests in flight."""

from __future__ import annotations

import asyncio

import pytest


class Gate:
    """A worker's behaviour that answers one request per permit."""

    def __init__(self) -> None:
        self.permits = asyncio.Semaphore(0)
        self.running = 0
        self.most = 0

    async def __call__(self, talk):
        self.running += 1
        self.most = max(self.most, self.running)
        await self.permits.acquire()
        self.running -= 1
        await talk.answer(talk.request.body)

    def open(self, count):
        for _ in range(count):
            self.permits.release()


@pytest.mark.parametrize("limit", [{"max_connections": 3}, {"max_in_flight_per_worker": 3}])
async def test_requests_beyond_the_limit_wait_in_order(make_worker, make_router, limit):
    gate = Gate()
    worker = await make_worker(gate)
    router = await make_router(worker, **limit)
    waiting = []
    for number in range(10):
        waiting.append(asyncio.create_task(router.post("/x", b"%d" % number)))
        await router.until(lambda number=number: router.metrics.received == number + 1)
    await router.until(lambda: len(router.server.dispatcher.waiting) == 7)
    gate.open(10)
    assert [response.body for response in await asyncio.gather(*waiting)] == [b"%d" % number for number in range(10)]
    assert gate.most == 3
    assert [request.body for request in worker.requests] == [b"%d" % number for number in range(10)]
    router.assert_settled()


@pytest.mark.parametrize("path", ["auto", "off"])
async def test_the_queue_is_bounded(make_worker, make_router, path):
    gate = Gate()
    router = await make_router(await make_worker(gate), max_connections=1, queue_size=2, hot_path=path)
    waiting = [asyncio.create_task(router.post()) for _ in range(3)]
    await router.until(lambda: len(router.server.dispatcher.waiting) == 2)
    refused = await router.post()
    assert (refused.status, refused.header("retry-after")) == (503, "1")
    gate.open(3)
    assert [response.status for response in await asyncio.gather(*waiting)] == [200] * 3
    assert router.metrics.outcomes == {"answered": 3, "refused": 1, "cut": 0, "cancelled": 0}


async def test_the_wait_is_bounded(make_worker, make_router):
    gate = Gate()
    router = await make_router(await make_worker(gate), max_connections=1, queue_timeout_s=0.2)
    first = asyncio.create_task(router.post())
    await router.until(lambda: gate.running)
    late = await router.post()
    assert (late.status, late.header("retry-after")) == (503, "1")
    gate.open(1)
    assert (await first).status == 200
    router.assert_settled()


async def test_a_connection_stays_usable_after_a_refusal(make_worker, make_router):
    worker = await make_worker()
    router = await make_router()
    client = await router.connect()
    assert (await client.post()).status == 503
    await router.post(f"/add_worker?url={worker.url}", b"")
    await router.state(worker, "healthy")
    assert (await client.post()).status == 200


@pytest.mark.parametrize("policy", ["round_robin", "power_of_two", "weighted", "sticky", "cache_aware"])
async def test_every_policy_serves(make_worker, make_router, policy):
    workers = [await make_worker() for _ in range(3)]
    router = await make_router(*workers, policy=policy)
    responses = await asyncio.gather(
        *(router.post("/x", b'{"text": "%d"}' % n, f"x-smg-routing-key: {n}") for n in range(30))
    )
    assert {response.status for response in responses} == {200}
    assert all(worker.requests for worker in workers)
    router.assert_settled()


async def test_two_clients_with_one_session_key_meet_one_worker(make_worker, make_router):
    workers = [await make_worker() for _ in range(3)]
    router = await make_router(*workers, policy="sticky")
    for _ in range(5):
        for _ in range(2):
            await router.post("/x", b"{}", "X-SMG-Routing-Key: one")
    assert sorted(len(worker.requests) for worker in workers) == [0, 0, 10]


class BrokenPolicy:
    def __init__(self, settings):
        self.left = 2

    def choose(self, workers, request):
        self.left -= 1
        if self.left >= 0:
            raise KeyError("broken")
        return workers[0]


async def test_a_broken_policy_costs_the_request_and_is_named(make_worker, make_router, monkeypatch):
    import miles.router.policies.load as load

    monkeypatch.setattr(load, "BrokenPolicy", BrokenPolicy, raising=False)
    router = await make_router(await make_worker(), policy="miles.router.policies.load.BrokenPolicy")
    first = await router.post()
    assert (first.status, "BrokenPolicy" in first.body.decode()) == (500, True)
    await router.post()
    assert (await router.post()).status == 200
    router.assert_settled()


async def test_a_policy_that_breaks_for_a_waiting_request_costs_only_that_one(make_worker, make_router, monkeypatch):
    import miles.router.policies.load as load

    monkeypatch.setattr(load, "BrokenPolicy", BrokenPolicy, raising=False)
    worker = await make_worker()
    await worker.kill()
    router = await make_router(worker, ready=False, policy="miles.router.policies.load.BrokenPolicy")
    waiting = [asyncio.create_task(router.post()) for _ in range(4)]
    await router.until(lambda: len(router.server.dispatcher.waiting) == 4)
    await worker.start()
    assert sorted(response.status for response in await asyncio.gather(*waiting)) == [200, 200, 500, 500]
    router.assert_settled()
