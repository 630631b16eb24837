"""How much a router holds: many requests, long bodies, slow readers; its memory seen from outside."""

from __future__ import annotations

import asyncio
import resource

import pytest

from miles.router.process import raise_file_limit

pytestmark = pytest.mark.slow

NUM_REQUESTS = 8_000
LONG_BODY_BYTES = 100 << 20


async def test_8000_requests_in_flight_take_less_than_200_megabytes(make_worker, run, until):
    raise_file_limit()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * NUM_REQUESTS + 1000:
        pytest.skip("this system does not allow so many open files")
    release = asyncio.Event()

    async def slow(talk):
        await release.wait()
        await talk.answer(talk.request.target.encode())

    workers = [await make_worker(slow) for _ in range(2)]
    urls = [worker.url for worker in workers]
    router = await run("--connect-timeout-s", "60", "--health-check-interval-s", "60", "--worker", *urls)
    await router.ready(2)
    before = router.peak_mb
    waiting = [asyncio.create_task(router.get(f"/{number}")) for number in range(NUM_REQUESTS)]
    await until(lambda: sum(len(worker.requests) for worker in workers) == NUM_REQUESTS)
    release.set()
    answers = await asyncio.gather(*waiting)
    assert answers == [(200, f"/{number}".encode()) for number in range(NUM_REQUESTS)]
    assert before < router.peak_mb < 200


@pytest.mark.parametrize("path", ["auto", "off"])
async def test_a_body_of_100_megabytes_passes_both_ways_in_bounded_memory(make_worker, run, path):
    worker = await make_worker()
    router = await run("--hot-path", path, "--worker", worker.url)
    await router.ready(1)
    before = router.peak_mb
    body = bytes(range(256)) * (LONG_BODY_BYTES // 256)
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1 << 20)
    writer.write(b"POST /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
    writer.write(body)
    answer = await reader.read()
    assert answer.endswith(b"\r\n\r\n" + body)
    assert router.peak_mb - before < 16
    writer.close()


@pytest.mark.parametrize("path", ["auto", "off"])
async def test_eight_long_answers_to_slow_readers_take_less_than_64_megabytes(make_worker, run, path):
    async def flood(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (64 << 20))
        for _ in range(1024):
            await talk.send(b"x" * 65536)

    worker = await make_worker(flood)
    router = await run("--hot-path", path, "--worker", worker.url)
    await router.ready(1)
    before = router.peak_mb
    readers = []
    for _ in range(8):
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1 << 16)
        writer.write(b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        readers.append((reader, writer))
    await asyncio.sleep(1.0)  # nobody reads, the worker sends what it can
    for reader, writer in readers:
        size = 0
        while piece := await reader.read(1 << 20):
            size += len(piece)
        assert size > 64 << 20
        writer.close()
    assert router.peak_mb - before < 64
