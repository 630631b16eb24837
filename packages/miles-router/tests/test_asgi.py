"""The slow path hands requests over as they came only where no middleware has changed or read them."""

from __future__ import annotations

import asyncio

import pytest

REQUEST = b"POST /a?b=c HTTP/1.1\r\nhost: x\r\nX-Odd:  Value \r\ncontent-length: 2\r\n\r\nhi"


@pytest.fixture
def serve(make_router, middleware_that):
    async def serve(act, *workers):
        return await make_router(*workers, middleware=(middleware_that(act),))

    return serve


async def unchanged(app, scope, receive, send):
    await app(scope, receive, send)


async def field_added_in_place(app, scope, receive, send):
    scope["headers"].append((b"x-added", b"1"))
    await app(scope, receive, send)


async def field_replaced_in_a_copy(app, scope, receive, send):
    headers = [(b"x-added", b"1"), *scope["headers"][1:]]
    await app({**scope, "headers": headers}, receive, send)


async def path_changed(app, scope, receive, send):
    scope["raw_path"] = b"/changed"
    await app(scope, receive, send)


async def query_changed(app, scope, receive, send):
    await app({**scope, "query_string": b"d=e"}, receive, send)


async def method_changed(app, scope, receive, send):
    await app({**scope, "method": "PUT"}, receive, send)


def replaying(request):
    async def receive():
        return request

    return receive


async def body_replaced(app, scope, receive, send):
    assert (await receive())["body"] == b"hi"
    await app(scope, replaying({"type": "http.request", "body": b"ho", "more_body": False}), send)


async def body_replaced_by_a_longer_one(app, scope, receive, send):
    assert (await receive())["body"] == b"hi"
    await app(scope, replaying({"type": "http.request", "body": b"hello", "more_body": False}), send)


async def body_replaced_behind_another_server(app, scope, receive, send):
    await body_replaced(app, {**scope, "extensions": {}}, receive, send)


@pytest.mark.parametrize(
    ("act", "line", "added", "body"),
    [
        (unchanged, "POST /a?b=c", None, b"hi"),
        (field_added_in_place, "POST /a?b=c", "1", b"hi"),
        (field_replaced_in_a_copy, "POST /a?b=c", "1", b"hi"),
        (path_changed, "POST /changed?b=c", None, b"hi"),
        (query_changed, "POST /a?d=e", None, b"hi"),
        (method_changed, "PUT /a?b=c", None, b"hi"),
        (body_replaced, "POST /a?b=c", None, b"ho"),
        (body_replaced_by_a_longer_one, "POST /a?b=c", None, b"hello"),
        (body_replaced_behind_another_server, "POST /a?b=c", None, b"ho"),
    ],
)
async def test_what_middleware_changes_of_a_request_reaches_the_worker(serve, make_worker, act, line, added, body):
    worker = await make_worker()
    router = await serve(act, worker)
    client = await router.connect()
    for _ in range(3):
        await client.send(REQUEST)
        assert (await client.response()).body == body
    for seen in worker.requests:
        assert (f"{seen.method} {seen.target}", seen.header("x-added"), seen.body) == (line, added, body)
        assert seen.header("x-odd") == "Value"
    await router.settled(3)


async def test_an_answer_that_nobody_looks_at_passes_as_it_is(serve, make_worker):
    async def behaviour(talk):
        await talk.answer(b"ok", 200, "X-Odd:  Value", "Content-Type: a/b")

    router = await serve(unchanged, await make_worker(behaviour))
    answer = await router.post()
    assert answer.raw_head.endswith(b"\r\nX-Odd:  Value\r\nContent-Type: a/b\r\n\r\n")
    assert answer.body == b"ok"


async def test_an_answer_is_seen_by_middleware_that_looks(serve, make_worker):
    seen = []

    async def act(app, scope, receive, send):
        async def look(message):
            seen.append(message.get("status") or message["body"])
            await send(message)

        await app(scope, receive, look)

    router = await serve(act, await make_worker())
    assert (await router.post("/a", b"hi")).body == b"hi"
    assert seen == [200, b"hi"]


@pytest.mark.parametrize("act", [unchanged, field_added_in_place, body_replaced])
async def test_a_client_that_leaves_is_noticed_at_once(serve, make_worker, act):
    left = asyncio.Event()

    async def hang(talk):
        await talk.client_left()
        left.set()

    worker = await make_worker(hang)
    router = await serve(act, worker)
    client = await router.connect()
    await client.send(REQUEST)
    await router.until(lambda: worker.requests)
    client.reset()
    await asyncio.wait_for(left.wait(), 20)
    await router.settled()
    assert router.metrics.cancelled == 1


async def test_a_client_that_left_while_middleware_thought_costs_no_worker_anything(serve, make_worker):
    gone = asyncio.Event()

    async def act(app, scope, receive, send):
        request = await receive()
        assert (await receive())["type"] == "http.disconnect"
        gone.set()
        await app(scope, replaying(request), send)

    worker = await make_worker()
    router = await serve(act, worker)
    client = await router.connect()
    await client.send(REQUEST)
    client.reset()
    await asyncio.wait_for(gone.wait(), 20)
    await router.settled()
    assert worker.requests == []
    assert router.metrics.cancelled == 1


@pytest.mark.parametrize("hot_path", ["auto", "off"])
async def test_a_request_forgets_which_workers_failed_an_earlier_one(make_worker, make_router, hot_path):
    good, refusing = await make_worker(), await make_worker()
    router = await make_router(good, refusing, hot_path=hot_path, worker_idle_timeout_s=60, policy="round_robin",
                               health_check_interval_s=60, health_check_failure_threshold=1000)  # fmt: skip
    await refusing.stop_listening()
    client = await router.connect()
    for _ in range(2):  # one of them is refused a connection, and goes to the other worker
        assert (await client.post()).status == 200
    assert router.metrics.retries == 1
    await refusing.start()
    await router.state(refusing, "healthy")
    for _ in range(4):
        assert (await client.post()).status == 200
    assert len(refusing.requests) == 2
