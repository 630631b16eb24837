"""Clients that are slow or leave early."""

from __future__ import annotations

import asyncio

from scripted_worker import answers_after


async def test_a_slow_head_is_cut_off(make_worker, make_router):
    router = await make_router(await make_worker(), header_timeout_s=0.2)
    client = await router.connect()
    await client.send(b"GET /x HTTP/1.1\r\n")

    async def drip():
        while True:
            client.writer.write(b"x-a: b\r\n")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    assert (await client.response()).status == 408
    dripping.cancel()
    assert await client.closed()


async def test_a_body_that_stops_coming_is_refused(make_worker, make_router):
    router = await make_router(await make_worker(), stall_timeout_s=0.2)
    client = await router.connect()
    await client.send(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nsome")
    assert (await client.response()).status == 408
    await router.settled()


async def test_a_stalled_upload_frees_its_worker(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker, stall_timeout_s=0.2, buffered_body_bytes=10)
    client = await router.connect()
    await client.send(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n" + b"a" * 50)
    assert (await client.response()).status == 408
    await router.settled()


async def test_an_idle_connection_is_closed(make_worker, make_router):
    router = await make_router(await make_worker(), idle_timeout_s=0.3, header_timeout_s=0.4)
    client = await router.connect()
    fresh = await router.connect()
    assert (await client.post()).status == 200
    assert await client.closed()
    assert await fresh.closed()


async def test_a_busy_connection_is_never_taken_for_idle(make_worker, make_router):
    router = await make_router(await make_worker(), idle_timeout_s=0.3, header_timeout_s=0.2)
    for attempts_left in reversed(range(5)):
        client = await router.connect()
        try:
            for _ in range(60):
                assert (await client.post()).status == 200
                await asyncio.sleep(0.02)
            return
        except ConnectionError:  # a machine that stands still for 0.3 s makes it idle; one good round is proof
            assert attempts_left


async def test_a_client_that_takes_nothing_is_dropped(make_worker, make_router):
    async def flood(talk):
        await talk.answer(b"x" * (64 << 20))

    router = await make_router(await make_worker(flood), stall_timeout_s=0.4)
    client = await router.connect()
    client.writer.transport.pause_reading()
    await client.send(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
    await router.settled(1)
    assert router.metrics.cancelled == 1


async def test_slow_readers_cost_bounded_memory(make_worker, make_router, path):
    sent = []

    async def flood(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 67108864\r\n\r\n")
        for _ in range(1024):
            await talk.send(b"x" * 65536)
            sent.append(65536)

    router = await make_router(await make_worker(flood), hot_path=path)
    client = await router.connect()
    client.writer.transport.pause_reading()
    await client.send(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
    await settled_size(sent)
    assert sum(sent) < 16 << 20
    client.writer.transport.resume_reading()
    assert len((await client.response()).body) == 64 << 20


async def test_a_worker_that_takes_nothing_stops_the_upload(make_worker, make_router, path):
    release = asyncio.Event()
    worker = await make_worker()

    async def lazy(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await release.wait()
        rest = 64 << 20
        while rest:
            rest -= len(await reader.read(1 << 20))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    router = await make_router(worker, hot_path=path, health_check_interval_s=60)
    await worker.kill()
    server = await asyncio.start_server(lazy, "127.0.0.1", worker.port)
    client = await router.connect()
    sent = []

    async def upload():
        await client.send(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 67108864\r\n\r\n")
        for _ in range(1024):
            await client.send(b"x" * 65536)
            sent.append(65536)

    uploading = asyncio.create_task(upload())
    await settled_size(sent)
    assert sum(sent) < 24 << 20
    release.set()
    assert (await client.response()).body == b"ok"
    await uploading
    server.close()


async def test_a_client_that_leaves_while_waiting_aborts_its_request(make_worker, make_router, path):
    left = asyncio.Event()

    async def hang(talk):
        await talk.client_left()
        left.set()

    worker = await make_worker(hang)
    router = await make_router(worker, hot_path=path)
    client = await router.connect()
    await client.send(b'POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 17\r\n\r\n{"rid": "abc-12"}')
    await router.until(lambda: worker.requests)
    client.reset()
    await asyncio.wait_for(left.wait(), 60)
    await router.until(lambda: worker.aborted == ["abc-12"])
    await router.settled()
    assert router.metrics.cancelled == 1
    assert router.worker(worker).state == "healthy"


async def test_a_client_that_leaves_a_stream_aborts_every_rid_of_its_batch(make_worker, make_router, path):
    async def stream(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await talk.client_left()

    worker = await make_worker(stream)
    router = await make_router(worker, hot_path=path)
    client = await router.connect()
    await client.send(b'POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 19\r\n\r\n{"rid": ["a", "b"]}')
    await client.reader.readuntil(b"hello")
    client.reset()
    await router.until(lambda: sorted(worker.aborted) == ["a", "b"])
    await router.settled()


async def test_a_client_that_leaves_the_queue_or_an_upload_leaves_nothing_behind(make_worker, make_router, path):
    async def hang(talk):
        await talk.client_left()

    worker = await make_worker(hang)
    router = await make_router(worker, hot_path=path, max_in_flight_per_worker=1)
    clients = [await router.connect() for _ in range(4)]
    for client in clients[:3]:
        await client.send(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
    await clients[3].send(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nsome")
    await router.until(lambda: len(router.server.dispatcher.waiting) == 2)
    for client in reversed(clients):
        client.reset()
    await router.until(lambda: router.metrics.received >= 3)
    await router.settled()
    assert router.metrics.cancelled == router.metrics.received


async def test_a_client_that_leaves_during_connect_leaves_nothing_behind(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker, health_check_interval_s=60)
    await worker.kill()
    clients = [await router.connect() for _ in range(10)]
    for client in clients:
        await client.send(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
        client.reset()
    await router.settled(0)


async def test_pipelined_requests_of_a_client_that_leaves_are_dropped(make_worker, make_router):
    release = asyncio.Event()
    slow = answers_after(release, b"x" * (8 << 20))
    worker = await make_worker(slow)
    router = await make_router(worker)
    client = await router.connect()
    await client.send(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n" * 5)
    await router.until(lambda: router.metrics.received == 5)
    client.reset()
    release.set()
    await router.settled(5)
    assert router.metrics.cancelled >= 3


async def test_an_answer_before_the_end_of_the_request_arrives_and_the_connection_ends(make_worker, make_router):
    worker = await make_worker()

    async def early(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 No\r\ncontent-length: 3\r\n\r\nbig")
        await reader.read()
        writer.close()

    router = await make_router(worker, health_check_interval_s=60, buffered_body_bytes=10)
    await worker.kill()
    server = await asyncio.start_server(early, "127.0.0.1", worker.port)
    client = await router.connect()
    await client.send(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n" + b"a" * 100)
    response = await client.response()
    assert (response.status, response.body) == (413, b"big")
    await client.send(b"a" * 900)
    assert await client.closed()
    await router.settled()
    server.close()


async def settled_size(sent):
    """Return when nothing more is taken."""
    before = -1
    while len(sent) != before or not sent:
        before = len(sent)
        await asyncio.sleep(0.2)


async def test_a_long_beginning_of_an_answer_waits_for_a_slow_reader(make_worker, make_router):
    async def answer(talk):
        await talk.answer(b"x" * 12_000_000)

    router = await make_router(await make_worker(answer), look_ahead_bytes=8_000_000)
    client = await router.connect()
    await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi")
    await asyncio.sleep(0.2)
    assert len((await client.response()).body) == 12_000_000
    await router.settled()
