"""Workers that answer errors, garbage, or more than they were asked: no client takes it for an answer."""

from __future__ import annotations

import asyncio

import pytest

KNOWN_LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"


async def test_a_worker_that_promises_too_much_cuts_the_answer_visibly(make_worker, make_router):
    async def short(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" + b"x" * 70_000)
        await asyncio.sleep(0.02)
        talk.writer.close()

    router = await make_router(await make_worker(short))
    response = await router.post()
    assert not response.complete
    await router.settled()
    assert router.metrics.cut == 1


@pytest.mark.parametrize("tail", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"])
async def test_bytes_beyond_the_promised_length_never_reach_a_client(make_worker, make_router, tail, path):
    async def long(talk):
        await talk.send(KNOWN_LENGTH + b"0123456789" + tail)
        await talk.client_left() if tail else None

    worker = await make_worker(long)
    router = await make_router(worker, hot_path=path)
    client = await router.connect()
    for _ in range(3):
        assert (await client.post()).body == b"0123456789"
    router.assert_settled()


@pytest.mark.parametrize(
    "garbage",
    [
        b"not http at all\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1, 1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nx: a\r\n folded\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\ny: b\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon here\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 300_000,
    ],
)
async def test_garbage_from_a_worker_is_a_502_and_goes_nowhere(make_worker, make_router, garbage):
    async def behaviour(talk):
        await talk.send(garbage)
        await talk.client_left()

    worker = await make_worker(behaviour)
    router = await make_router(worker, health_check_failure_threshold=1000)
    response = await router.post()
    assert response.status == 502
    assert worker.url in response.json()["error"]["message"]
    router.assert_settled()
    assert router.metrics.refusals == {502: 1}


async def test_garbage_in_the_middle_of_chunks_cuts_the_answer(make_worker, make_router, path):
    async def behaviour(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await asyncio.sleep(0.02)
        await talk.send(b"zz\r\n")
        await talk.client_left()

    router = await make_router(await make_worker(behaviour), hot_path=path)
    assert not (await router.post()).complete
    await router.settled()


async def test_client_errors_never_count_against_a_worker(make_worker, make_router):
    async def bad_request(talk):
        await talk.answer(b'{"error": "bad"}', 400)

    worker = await make_worker(bad_request)
    router = await make_router(worker)
    for _ in range(20):
        assert (await router.post()).status == 400
    assert router.worker(worker).state == "healthy"
    assert router.worker(worker).statuses[4] == 20


@pytest.mark.parametrize("status", [500, 503])
async def test_server_errors_pass_and_take_a_worker_out_while_another_is_left(make_worker, make_router, status):
    async def broken(talk):
        await talk.answer(b"broken", status, "x-detail: 1")

    bad, good = await make_worker(broken), await make_worker()
    router = await make_router(bad, good, health_check_interval_s=30)
    statuses = [(await router.post()).status for _ in range(30)]
    assert set(statuses) == {200, status}
    assert statuses.count(status) <= 8
    assert router.worker(bad).state in ("quarantined", "probing")


@pytest.mark.parametrize("status", [500, 503])
async def test_server_errors_do_not_take_the_last_worker_out(make_worker, make_router, status):
    async def broken(talk):
        await talk.answer(b"broken", status, "x-detail: 1")

    router = await make_router(await make_worker(broken))
    for _ in range(10):
        response = await router.post()
        assert (response.status, response.body, response.header("x-detail")) == (status, b"broken", "1")


async def test_bytes_that_nobody_asked_for_end_their_connection(make_worker, make_router):
    async def talkative(talk):
        await talk.answer()
        await go.wait()
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        await talk.client_left()
        left.set()

    go, left = asyncio.Event(), asyncio.Event()
    router = await make_router(await make_worker(talkative), health_check_interval_s=60)
    client = await router.connect()
    assert (await client.post()).body == b"{}"
    go.set()
    await left.wait()
    assert (await client.post()).body == b"{}"


@pytest.mark.parametrize("pause_s", [0.0, 0.02])
async def test_bytes_after_the_last_chunk_never_reach_a_client(make_worker, make_router, pause_s, path):
    async def behaviour(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n")
        await asyncio.sleep(pause_s)
        await talk.send(b"0\r\n\r\nHTTP/1.1 200 OK\r\n")

    router = await make_router(await make_worker(behaviour), hot_path=path)
    client = await router.connect()
    for _ in range(3):
        assert (await client.post()).body == b"ok"
    await router.settled()


async def test_bytes_after_a_long_answer_never_reach_a_client(make_worker, make_router):
    async def behaviour(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n01234")
        await asyncio.sleep(0.02)
        await talk.send(b"56789HTTP/1.1 200 OK\r\n")

    router = await make_router(await make_worker(behaviour))
    client = await router.connect()
    for _ in range(3):
        assert (await client.post()).body == b"0123456789"


@pytest.mark.parametrize(
    ("info", "version"),
    [
        (b'{"weight_version": 7}', "7"),
        (b'{"weight_version": null}', None),
        (b"not json", None),
        (b"[7]", None),
        (b"[" * 100_000, None),
    ],
    ids=["number", "nothing", "no-json", "list", "deep"],
)
async def test_whatever_a_worker_says_about_its_weights_is_survived(make_worker, make_router, info, version):
    worker = await make_worker()
    worker.weight_version = "said"
    worker.model_info = info
    router = await make_router(worker)
    assert router.worker(worker).weight_version == version
