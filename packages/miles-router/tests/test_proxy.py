"""What a client sends reaches the worker and its answer the client, on the fast path and through ASGI."""

from __future__ import annotations

import asyncio

import pytest


async def test_request_and_answer_pass_byte_for_byte(make_worker, make_router, path):
    answer = bytes(range(256)) * 40

    async def behaviour(talk):
        await talk.answer(answer, 200, 'x-meta: a;b="c"', "Content-Type: application/weird")

    worker = await make_worker(behaviour)
    router = await make_router(worker, hot_path=path)
    body = b'{"return_routed_experts": true, "unknown": [1.0, 1e400], "text": "\xc3\xa9"}'
    response = await router.post("/generate?a=1&b=%20", body, "X-Custom: Value With Case", "cookie: a=1")
    seen = worker.requests[0]
    assert (seen.method, seen.target, seen.body) == ("POST", "/generate?a=1&b=%20", body)
    assert seen.header("x-custom") == "Value With Case"
    assert seen.header("cookie") == "a=1"
    assert seen.header("host") == f"127.0.0.1:{worker.port}"
    assert (response.status, response.body) == (200, answer)
    assert response.header("x-meta") == 'a;b="c"'
    assert response.header("content-type") == "application/weird"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_every_method_and_path_passes(make_worker, make_router, path, method):
    worker = await make_worker()
    router = await make_router(worker, hot_path=path)
    client = await router.connect()
    await client.send(f"{method} /v1/some/path HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert (await client.response()).status == 200
    assert (worker.requests[0].method, worker.requests[0].target) == (method, "/v1/some/path")
    assert worker.requests[0].header("content-length") is None
    assert worker.requests[0].header("transfer-encoding") is None


async def test_an_empty_post_keeps_its_length(make_worker, make_router, path):
    worker = await make_worker()
    router = await make_router(worker, hot_path=path)
    await router.post("/x", b"")
    assert worker.requests[0].header("content-length") == "0"


async def test_fields_of_one_connection_are_not_forwarded(make_worker, make_router, path):
    async def behaviour(talk):
        await talk.answer(b"ok", 200, "Keep-Alive: timeout=5", "Connection: x-private", "X-Private: 1", "x-public: 2")

    worker = await make_worker(behaviour)
    router = await make_router(worker, hot_path=path)
    response = await router.post(
        "/x", b"{}", "Connection: keep-alive, x-secret", "x-secret: 1", "te: trailers", "keep-alive: 1"
    )
    seen = dict(worker.requests[0].headers)
    assert {"connection", "x-secret", "te", "keep-alive"}.isdisjoint(seen)
    got = dict(response.headers)
    assert {"keep-alive", "x-private", "connection"}.isdisjoint(got)
    assert got["x-public"] == "2"
    assert response.body == b"ok"


async def test_a_connection_option_cannot_take_the_length_away(make_worker, make_router, path):
    async def behaviour(talk):
        await talk.answer(b"0123456789", 200, "Connection: content-length")

    worker = await make_worker(behaviour)
    router = await make_router(worker, hot_path=path)
    response = await router.post("/x", b"hello", "Connection: content-length")
    assert worker.requests[0].body == b"hello"
    assert response.body == b"0123456789"


async def test_connections_are_reused_on_both_sides(make_worker, make_router, path):
    worker = await make_worker()
    router = await make_router(worker, hot_path=path, health_check_interval_s=60)
    client = await router.connect()
    before = worker.connections
    for number in range(20):
        assert (await client.post("/x", b"%d" % number)).body == b"%d" % number
    assert worker.connections == before + 1


async def test_chunked_request_is_understood_and_sent_on(make_worker, make_router, path):
    worker = await make_worker()
    router = await make_router(worker, hot_path=path)
    client = await router.connect()
    await client.send(b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5;ext=1\r\nhello\r\n")
    await asyncio.sleep(0.02)
    await client.send(b"6\r\n world\r\n0\r\nx-trailer: 1\r\n\r\n")
    assert (await client.response()).body == b"hello world"
    assert worker.requests[0].header("x-trailer") is None


async def test_chunked_answer_arrives_as_it_is_sent(make_worker, make_router, path):
    seen = asyncio.Event()

    async def behaviour(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await talk.send(b"8\r\ndata: 1\n\r\n")
        await seen.wait()
        await talk.send(b"8\r\ndata: 2\n\r\n0\r\n\r\n")

    worker = await make_worker(behaviour)
    router = await make_router(worker, hot_path=path)
    client = await router.connect()
    await client.send(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
    first = await client.reader.readuntil(b"data: 1\n\r\n")
    assert b"text/event-stream" in first
    seen.set()
    rest = await client.reader.readuntil(b"0\r\n\r\n")
    assert rest == b"8\r\ndata: 2\n\r\n0\r\n\r\n"
    router.assert_settled()


async def test_trailers_of_an_answer_pass(make_worker, make_router):
    async def behaviour(talk):
        await talk.send(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n"
        )

    router = await make_router(await make_worker(behaviour))
    response = await router.post()
    assert (response.body, response.trailers) == (b"ok", b"x-sum: 7\r\n")


async def test_an_answer_that_ends_with_its_connection_is_chunked_for_the_client(make_worker, make_router, path):
    async def behaviour(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\n\r\npart one, ")
        await asyncio.sleep(0.02)
        await talk.send(b"part two")
        talk.writer.close()

    router = await make_router(await make_worker(behaviour), hot_path=path)
    client = await router.connect()
    for _ in range(2):
        response = await client.post()
        assert response.body == b"part one, part two"
        assert response.header("transfer-encoding") == "chunked"


async def test_an_http_1_0_worker_is_served(make_worker, make_router, path):
    async def behaviour(talk):
        await talk.send(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok")
        talk.writer.close()

    router = await make_router(await make_worker(behaviour), hot_path=path)
    client = await router.connect()
    for _ in range(2):
        response = await client.post()
        assert response.raw_head.startswith(b"HTTP/1.1 200")
        assert response.body == b"ok"


@pytest.mark.parametrize("connection", ["", "connection: keep-alive\r\n"])
async def test_an_http_1_0_client_is_served_without_chunks(make_worker, make_router, connection):
    async def behaviour(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n3\r\nay!\r\n0\r\n\r\n")

    router = await make_router(await make_worker(behaviour))
    client = await router.connect()
    await client.send(f"GET /x HTTP/1.0\r\n{connection}\r\n".encode())
    response = await client.response()
    assert response.header("transfer-encoding") is None
    assert response.body == b"okay!"
    assert await client.closed()


async def test_head_has_no_body(make_worker, make_router, path):
    async def behaviour(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\nx-a: 1\r\n\r\n")

    worker = await make_worker(behaviour)
    router = await make_router(worker, hot_path=path)
    client = await router.connect()
    for _ in range(2):
        await client.send(b"HEAD /x HTTP/1.1\r\nhost: x\r\n\r\n")
        response = await client.response(bodiless=True)
        assert response.header("content-length") == "1000"
        assert response.header("x-a") == "1"


async def test_a_body_that_a_worker_sends_to_head_goes_nowhere(make_worker, make_router, path):
    async def behaviour(talk):
        await talk.answer(b"not asked for")

    router = await make_router(await make_worker(behaviour), hot_path=path)
    client = await router.connect()
    for _ in range(3):
        await client.send(b"HEAD /x HTTP/1.1\r\nhost: x\r\n\r\n")
        response = await client.response(bodiless=True)
        assert (response.status, response.header("content-length")) == (200, "13")
    await router.settled(3)


@pytest.mark.parametrize(("status", "fields"), [(204, ""), (304, ""), (304, "content-length: 5\r\n")])
async def test_answers_without_a_body_leave_the_connection_usable(make_worker, make_router, path, status, fields):
    async def behaviour(talk):
        await talk.send(f"HTTP/1.1 {status} X\r\nx-a: 1\r\n{fields}\r\n".encode())

    router = await make_router(await make_worker(behaviour), hot_path=path)
    client = await router.connect()
    for _ in range(2):
        assert (await client.post()).status == status


async def test_interim_answers_are_passed_over(make_worker, make_router, path):
    async def behaviour(talk):
        await talk.send(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")
        await asyncio.sleep(0.01)
        await talk.send(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    router = await make_router(await make_worker(behaviour), hot_path=path)
    assert (await router.post()).body == b"ok"


async def test_a_client_that_expects_continue_gets_it(make_worker, make_router, path):
    router = await make_router(await make_worker(), hot_path=path)
    client = await router.connect()
    await client.send(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n")
    assert (await client.response()).status == 100
    await client.send(b"hello")
    assert (await client.response()).body == b"hello"


async def test_pipelined_requests_are_answered_in_order(make_worker, make_router, path):
    async def behaviour(talk):
        await asyncio.sleep(0.05 if talk.request.target == "/slow" else 0)
        await talk.answer(talk.request.target.encode())

    router = await make_router(await make_worker(behaviour), await make_worker(behaviour), hot_path=path)
    client = await router.connect()
    await client.send(
        b"".join(f"GET {name} HTTP/1.1\r\nhost: x\r\n\r\n".encode() for name in ("/slow", "/health", "/b", "/c"))
    )
    assert (await client.response()).body == b"/slow"
    assert (await client.response()).json()["status"] == "ok"
    assert (await client.response()).body == b"/b"
    assert (await client.response()).body == b"/c"
    router.assert_settled()


async def test_a_body_of_60_megabytes_passes_both_ways(make_worker, make_router, path):
    size = 60 << 20
    worker = await make_worker()
    router = await make_router(worker, hot_path=path)
    body = b"x" * size
    client = await router.connect()
    sending = asyncio.create_task(client.send(post_head(size) + body))
    response = await client.response()
    await sending
    assert response.body == body
    assert worker.requests[0].body == body


async def test_a_body_that_is_buffered_and_long_passes(make_worker, make_router, path):
    worker = await make_worker()
    router = await make_router(worker, hot_path=path)
    assert (await router.post("/x", b"m" * 300_000)).body == b"m" * 300_000


async def test_a_long_chunked_request_passes(make_worker, make_router, path):
    worker = await make_worker()
    router = await make_router(worker, hot_path=path, buffered_body_bytes=1000)
    client = await router.connect()
    await client.send(b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(50):
        await client.send(b"100\r\n" + b"y" * 256 + b"\r\n")
    await client.send(b"0\r\n\r\n")
    assert (await client.response()).body == b"y" * 12800
    assert worker.requests[0].body == b"y" * 12800


async def test_a_client_that_asks_to_close_is_told_so(make_worker, make_router, path):
    router = await make_router(await make_worker(), hot_path=path)
    client = await router.connect()
    response = await client.post("/x", b"{}", "connection: close")
    assert response.header("connection") == "close"
    assert await client.closed()


async def test_targets_that_need_a_full_parse_reach_the_worker_unchanged(make_worker, make_router, path):
    worker = await make_worker()
    router = await make_router(worker, hot_path=path)
    for target in ("/a%20b?q=%2F", "/a%2Fb", "//double", "/workers-of-mine"):
        assert (await router.get(target)).status == 200
    await router.get("http://elsewhere.example/v1/models?x=1")
    assert worker.paths == ["/a%20b?q=%2F", "/a%2Fb", "//double", "/workers-of-mine", "/v1/models?x=1"]


def post_head(size: int) -> bytes:
    return f"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode()


async def test_bytes_after_a_chunked_answer_end_its_connection(make_worker, make_router, path):
    async def too_much(talk):
        await talk.send(
            b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\nHTTP/1.1 200 Y\r\n\r\n"
        )

    worker = await make_worker(too_much)
    router = await make_router(worker, hot_path=path)
    for _ in range(2):
        answer = await router.post()
        assert (answer.complete, answer.body) == (True, b"hi")
    assert worker.connections > 2  # health checks have their own, and no answer's was used twice
    await router.settled(2)


async def test_an_answer_that_begins_while_the_client_reads_an_earlier_one_arrives(make_worker, make_router):
    async def answer(talk):
        if talk.request.target == "/long":
            await talk.answer(b"x" * 4_000_000)
        else:
            await talk.send(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n")
            await asyncio.sleep(0.05)
            await talk.send(b"0\r\n\r\n")

    router = await make_router(await make_worker(answer))
    client = await router.connect()
    for target in ("/long", "/short"):
        await client.send(f"POST {target} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi".encode())
    await asyncio.sleep(0.1)
    assert len((await client.response()).body) == 4_000_000
    assert (await client.response()).body == b"hi"
    await router.settled(2)


async def test_no_worker_is_contacted_that_was_not_registered(make_worker, make_router, path):
    stranger = await make_worker()

    async def redirect(talk):
        await talk.answer(b"", 307, f"location: {stranger.url}/x")

    worker = await make_worker(redirect)
    router = await make_router(worker, hot_path=path)
    client = await router.connect()
    host = f"127.0.0.1:{stranger.port}"
    for target in (f"{stranger.url}/x", "/x", f"//{host}/x", f"/{stranger.url}", f"/x?url={stranger.url}"):
        head = f"POST {target} HTTP/1.1\r\nhost: {host}\r\nforwarded: host={host}\r\nx-forwarded-host: {host}\r\n"
        await client.send(head.encode() + b"content-length: 2\r\n\r\nhi")
        answer = await client.response()
        assert (answer.status, answer.header("location")) == (307, f"{stranger.url}/x")
    assert stranger.connections == 0
    assert len(worker.requests) == 5
