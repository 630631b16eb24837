"""Requests that are refused: nonsense, attempts to smuggle, more than the limits allow."""

from __future__ import annotations

import asyncio

import pytest
from scripted_worker import answers_after


@pytest.mark.parametrize(
    "attack",
    [
        b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nG",
        b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\nG",
        b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: +5\r\n\r\nhello",
        b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length : 5\r\n\r\nhello",
        b"POST /x HTTP/1.1\r\nhost: x\r\nx: a\r\n folded: b\r\n\r\n",
        b"POST /x HTTP/1.1\nhost: x\ncontent-length: 0\n\n",
        b"POST /x HTTP/1.1\r\nhost: x\r\nx: a\ncontent-length: 0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nhost: x\r\nx: a\0b\r\n\r\n",
        b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
async def test_ambiguous_or_broken_requests_are_refused(make_worker, make_router, attack, path):
    worker = await make_worker()
    router = await make_router(worker, hot_path=path)
    client = await router.connect()
    await client.send(attack)
    assert (await client.response()).status in (400, 501)
    client.reset()
    assert worker.requests == []
    await router.settled()
    assert router.metrics.received == 1


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n", 501),
        (b"POST /x HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nab", 501),
        (b"GET /x HTTP/0.9\r\n\r\n", 505),
        (b"GET ?no-path HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET http://h?no-path HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET http://host:99999999/ HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    ],
)
async def test_what_is_not_supported_is_named(make_worker, make_router, request_bytes, status):
    worker = await make_worker()
    router = await make_router(worker)
    client = await router.connect()
    await client.send(request_bytes)
    response = await client.response()
    assert response.status == status
    assert response.json()["error"]["code"] == status
    assert await client.closed()
    assert worker.requests == []


async def test_an_upgrade_without_a_body_is_served_without_the_upgrade(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker)
    client = await router.connect()
    await client.send(b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
    assert (await client.response()).status == 200
    assert worker.requests[0].header("upgrade") is None


@pytest.mark.parametrize("pieces", [1, 20])
async def test_a_header_above_the_limit_is_refused(make_worker, make_router, pieces):
    worker = await make_worker()
    router = await make_router(worker, max_header_bytes=10_000)
    client = await router.connect()
    data = b"GET /x HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 20_000 + b"\r\n\r\n"
    for at in range(0, len(data), len(data) // pieces):
        await client.send(data[at : at + len(data) // pieces])
    assert (await client.response()).status == 431
    assert await client.closed()


async def test_a_header_of_a_megabyte_is_refused(make_worker, make_router):
    router = await make_router(await make_worker())
    client = await router.connect()
    sending = asyncio.create_task(client.send(b"GET /x HTTP/1.1\r\nx: " + b"a" * (1 << 20) + b"\r\n\r\n"))
    assert (await client.response()).status == 431
    await asyncio.gather(sending, return_exceptions=True)


async def test_a_long_body_does_not_count_as_header(make_worker, make_router):
    router = await make_router(await make_worker(), max_header_bytes=1000)
    client = await router.connect()
    for _ in range(3):
        assert (await client.post("/x", b"b" * 50_000)).body == b"b" * 50_000


@pytest.mark.parametrize("size", [1001, 5_000_000])
async def test_a_body_above_the_limit_is_refused_and_the_refusal_arrives(make_worker, make_router, path, size):
    worker = await make_worker()
    router = await make_router(worker, hot_path=path, max_body_bytes=1000)
    client = await router.connect()
    data = f"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode() + b"x" * size
    sending = asyncio.create_task(client.send(data))
    response = await client.response()
    assert response.status == 413
    assert "1000" in response.json()["error"]["message"]
    client.reset()
    await asyncio.gather(sending, return_exceptions=True)
    assert worker.requests == []
    await router.settled()


async def test_a_pipelined_request_that_is_refused_waits_for_its_turn(make_worker, make_router):
    release = asyncio.Event()
    slow = answers_after(release, b"first")
    worker = await make_worker(slow)
    router = await make_router(worker, max_body_bytes=10)
    client = await router.connect()
    await client.send(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\nPOST /b HTTP/1.1\r\ncontent-length: 20\r\n\r\n" + b"x" * 20)
    await router.until(lambda: router.metrics.refusals)
    release.set()
    assert (await client.response()).body == b"first"
    assert (await client.response()).status == 413
    assert [request.target for request in worker.requests] == ["/a"]


@pytest.mark.parametrize("fields", [(), ("connection: keep-alive",)], ids=["plain", "parsed"])
async def test_a_fault_of_the_router_costs_one_request(make_worker, make_router, monkeypatch, fields):
    router = await make_router(await make_worker())

    def broken(exchange):
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(router.server.dispatcher, "place", broken)
        assert (await router.post("/generate", b"{}", *fields)).status == 500
    assert (await router.post("/generate", b"{}", *fields)).status == 200
    await router.settled(2)


async def test_nonsense_after_a_request_does_not_disturb_its_answer(make_worker, make_router):
    release = asyncio.Event()
    slow = answers_after(release, b"good")
    worker = await make_worker(slow)
    router = await make_router(worker)
    client = await router.connect()
    await client.send(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n" + b"nonsense\r\n\r\n")
    await router.until(lambda: worker.requests)
    release.set()
    assert (await client.response()).body == b"good"
    assert await client.closed()
    assert router.metrics.outcomes == {"answered": 1, "refused": 1, "cut": 0, "cancelled": 0}


async def test_what_follows_a_refused_request_is_not_served(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker)
    client = await router.connect()
    bad = b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    await client.send(bad + b"GET /b HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await client.response()).status == 501
    assert await client.closed()
    assert not worker.requests


async def test_a_refused_client_that_stays_is_left(make_worker, make_router, monkeypatch):
    monkeypatch.setattr("miles.router.protocol._LINGER_S", 0.1)
    router = await make_router(await make_worker(), header_timeout_s=0.4)
    client = await router.connect()
    await client.send(b"nonsense\r\n\r\n")
    assert (await client.response()).status == 400
    await router.until(lambda: not router.server._uvicorn.server_state.connections)
