"""Workers that die, hang, lie or come back: each request ends in an answer or a clear error, and is counted once."""

from __future__ import annotations

import asyncio

import pytest
from scripted_worker import answers_after

from miles.router import dispatcher
from miles.router.upload import request_ids

KNOWN_LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"


async def dies(talk):
    talk.reset()


async def test_a_worker_that_dies_before_the_first_byte_costs_nothing(make_worker, make_router, path):
    good = await make_worker()
    bad = await make_worker(dies)
    router = await make_router(bad, good, hot_path=path, health_check_failure_threshold=1000)
    for number in range(10):
        response = await router.post("/generate", b'{"n": %d}' % number)
        assert (response.status, response.json()) == (200, {"n": number})
    assert router.metrics.retries >= 1
    assert router.metrics.answered == 10
    router.assert_settled()


async def test_a_worker_that_dies_within_the_look_ahead_costs_nothing(make_worker, make_router, path):
    async def half(talk):
        await talk.send(KNOWN_LENGTH + b"01234")
        await asyncio.sleep(0.02)
        await talk.send(b"67")
        talk.reset()

    good, bad = await make_worker(), await make_worker(half)
    router = await make_router(bad, good, hot_path=path, health_check_failure_threshold=1000)
    for _ in range(4):
        response = await router.post()
        assert (response.status, response.complete) == (200, True)
    assert {len(bad.requests), len(good.requests)} != {0, 4}
    router.assert_settled()


async def test_a_look_ahead_that_fills_in_pieces_is_delivered_whole(make_worker, make_router, path):
    async def piecewise(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3000\r\n\r\n")
        for _ in range(3):
            await asyncio.sleep(0.005)
            await talk.send(b"z" * 1000)

    for look_ahead in (100_000, 1500, 0):
        router = await make_router(await make_worker(piecewise), hot_path=path, look_ahead_bytes=look_ahead)
        assert (await router.post()).body == b"z" * 3000
        router.assert_settled()


async def test_a_worker_that_dies_in_a_stream_cuts_the_answer_visibly(make_worker, make_router, path):
    async def stream(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await asyncio.sleep(0.02)
        talk.reset()

    router = await make_router(await make_worker(stream), await make_worker(stream), hot_path=path)
    response = await router.post()
    assert (response.status, response.complete) == (200, False)
    await router.settled()
    assert router.metrics.outcomes == {"answered": 0, "refused": 0, "cut": 1, "cancelled": 0}


async def test_a_worker_that_refuses_at_the_start_gets_nothing_until_it_is_up(make_worker, make_router):
    good, late = await make_worker(), await make_worker()
    await late.kill()
    router = await make_router(good, late, ready=False)
    await router.state(late, "quarantined")
    for _ in range(5):
        assert (await router.post()).status == 200
    assert len(good.requests) == 5
    await late.start()
    await router.state(late, "healthy")
    for _ in range(4):
        await router.post()
    assert late.requests


async def test_requests_wait_for_the_only_worker_to_come_back(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker)
    await worker.kill()
    waiting = [asyncio.create_task(router.post()) for _ in range(20)]
    await asyncio.sleep(0.1)
    await worker.start()
    assert [response.status for response in await asyncio.gather(*waiting)] == [200] * 20
    router.assert_settled()


async def test_a_killed_worker_loses_no_request_and_is_back_soon(make_worker, make_router, path):
    release = asyncio.Event()
    slow = answers_after(release)
    good, victim = await make_worker(slow), await make_worker(slow)
    router = await make_router(good, victim, hot_path=path)
    waiting = [asyncio.create_task(router.post()) for _ in range(20)]
    await router.until(lambda: len(victim.requests) >= 10)
    await victim.kill()
    await router.until(lambda: len(good.requests) >= 20)
    release.set()
    assert [response.status for response in await asyncio.gather(*waiting)] == [200] * 20
    await victim.start()
    await router.state(victim, "healthy")
    router.assert_settled()


async def test_a_request_that_kills_workers_is_sent_a_bounded_number_of_times(make_worker, make_router):
    workers = [await make_worker(dies) for _ in range(6)]
    router = await make_router(*workers, max_attempts=3)
    assert (await router.post()).status == 502
    assert sum(len(worker.requests) for worker in workers) == 3


@pytest.mark.slow
async def test_a_hanging_worker_is_left_within_its_threshold_and_comes_back(make_worker, make_router):
    async def hang(talk):
        if worker.hangs:
            await talk.client_left()
        else:
            await talk.answer()

    worker, good = await make_worker(hang), await make_worker()
    router = await make_router(worker, good, health_check_interval_s=1.0, health_check_timeout_s=0.5)
    loop = asyncio.get_running_loop()
    for _ in range(4):  # a busy machine makes times longer, never shorter: one good round is proof
        worker.hangs = True
        hung_at = loop.time()
        waiting = [asyncio.create_task(router.post()) for _ in range(10)]
        await router.state(worker, "quarantined")
        left_s = loop.time() - hung_at
        assert [response.status for response in await asyncio.gather(*waiting)] == [200] * 10
        worker.hangs = False
        well_at = loop.time()
        await router.state(worker, "healthy")
        router.assert_settled()
        if left_s < 4 and loop.time() - well_at < 3:
            return
    pytest.fail(f"left after {left_s:.1f} s, back after {loop.time() - well_at:.1f} s")


async def test_a_slow_health_check_does_not_take_requests_from_the_only_worker(make_worker, make_router):
    release = asyncio.Event()
    slow = answers_after(release, b"late")
    worker = await make_worker(slow)
    router = await make_router(worker)
    waiting = asyncio.create_task(router.post())
    await router.until(lambda: len(worker.requests) >= 1)
    worker.hangs = True
    await router.state(worker, "quarantined")
    release.set()
    assert (await waiting).body == b"late"
    assert len(worker.requests) == 1


async def test_a_worker_returns_only_with_the_weights_of_the_fleet(make_worker, make_router):
    first, second = await make_worker(), await make_worker()
    first.weight_version = second.weight_version = "7"
    router = await make_router(first, second)
    await second.kill()
    await router.state(second, "quarantined")
    second.weight_version = "6"
    await second.start()
    await router.until(lambda: "weights 6" in router.worker(second).reason)
    assert router.worker(second).state == "quarantined"
    second.weight_version = "7"
    await router.state(second, "healthy")


async def test_a_worker_with_newer_weights_than_the_fleet_is_welcome(make_worker, make_router):
    worker = await make_worker()
    worker.weight_version = "7"
    router = await make_router(worker)
    await worker.kill()
    await router.state(worker, "quarantined")
    worker.weight_version = "8"
    await worker.start()
    await router.state(worker, "healthy")
    status = (await router.get("/router/status")).json()
    assert status["weight_version"] == "8"


async def test_an_unresolvable_name_is_quarantined_and_requests_say_so(make_worker, make_router):
    router = await make_router()
    added = await router.post("/add_worker?url=http://no-such-host.invalid:1", b"")
    assert added.status == 200
    [worker] = list(router.server.dispatcher.fleet)
    await router.until(lambda: worker.state == "quarantined")


async def test_nothing_is_served_without_workers(make_router):
    router = await make_router()
    response = await router.post()
    assert response.status == 503
    assert response.header("retry-after") == "1"
    assert (await router.get("/readiness")).status == 503


async def test_a_stale_connection_is_replaced_without_counting_as_a_failure(make_worker, make_router):
    async def once(talk):
        await talk.answer()
        closing.set()
        await go.wait()
        talk.writer.close()

    closing, go = asyncio.Event(), asyncio.Event()
    worker = await make_worker(once)
    router = await make_router(worker, health_check_interval_s=60)
    client = await router.connect()
    for _ in range(10):
        go.clear()
        assert (await client.post()).status == 200
        go.set()
        assert (await client.post()).status == 200
    assert router.worker(worker).failures.total() == 0
    assert router.worker(worker).state == "healthy"


async def test_a_request_over_its_time_limit_is_a_504(make_worker, make_router, path):
    async def hang(talk):
        await talk.client_left()

    worker = await make_worker(hang)
    router = await make_router(worker, hot_path=path, request_timeout_s=0.2, stall_timeout_s=1)
    response = await router.post("/generate", b'{"rid": "r-1"}')
    assert response.status == 504
    router.assert_settled()


async def test_a_stream_over_its_time_limit_is_cut(make_worker, make_router):
    async def endless(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await talk.client_left()

    router = await make_router(await make_worker(endless), request_timeout_s=0.2, stall_timeout_s=1)
    assert not (await router.post()).complete
    router.assert_settled()


async def test_a_worker_that_reports_illness_is_left_and_recovers(make_worker, make_router):
    sick, well = await make_worker(), await make_worker()
    router = await make_router(sick, well)
    sick.health_status = 503
    await router.state(sick, "quarantined")
    assert "answered 503" in router.worker(sick).reason
    sick.health_status = 200
    await router.state(sick, "healthy")


async def test_a_worker_that_cannot_be_told_to_abort_is_no_fault(make_worker, make_router, caplog):
    async def hang(talk):
        await talk.client_left()

    worker = await make_worker(hang)
    router = await make_router(worker, health_check_interval_s=60)
    client = await router.connect()
    await client.send(b'POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 12\r\n\r\n{"rid": "a"}')
    await router.until(lambda: worker.requests)
    await worker.stop_listening()
    with caplog.at_level("INFO", "miles.router"):
        client.reset()
        await router.until(lambda: "was not told to abort a" in caplog.text)
    await router.settled()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"rid": "a\\u0062"}', "ab"),
        (b'{"text": "\\"rid\\": \\"no\\"", "rid" : ["a", "b"]}', ["a", "b"]),
        (b'{"rid": "\\x"}', None),
        (b'{"rid": null}', None),
        (b"", None),
    ],
)
def test_the_rid_is_found_in_the_body(body, expected):
    assert request_ids(body) == expected


async def test_a_worker_that_accepts_no_connection_in_time_is_passed_over(make_worker, make_router, monkeypatch):
    good, bad = await make_worker(), await make_worker()
    router = await make_router(good, bad, connect_timeout_s=0.1, health_check_failure_threshold=1000)

    async def stuck(worker):
        if worker.url == bad.url:
            await asyncio.sleep(60)
        return await original(worker)

    original = dispatcher.open_connection
    monkeypatch.setattr(dispatcher, "open_connection", stuck)
    for _ in range(4):
        assert (await router.post()).status == 200
    assert len(good.requests) == 4
