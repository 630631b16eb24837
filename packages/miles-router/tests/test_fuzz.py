"""Whatever clients and workers do to their bytes, requests keep their meaning and counters add up."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAMES = st.text(alphabet="abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(lambda name: "x-" + name)
VALUES = st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=30)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=5)
BODIES = st.one_of(st.binary(max_size=200), st.integers(0, 40_000).map(lambda size: b"z" * size))
CUTS = st.lists(st.integers(1, 300), max_size=6)


def pieces(data, cuts):
    """``data`` cut after the given numbers of bytes."""
    for cut in cuts:
        yield data[:cut]
        data = data[cut:]
    yield data


def chunks(body, cuts):
    parts = [part for part in pieces(body, cuts) if part]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def message(first, fields, body, framing, cuts):
    lines = [first, *(f"{name}: {value}" for name, value in fields)]
    if framing == "length":
        lines.append(f"Content-Length: {len(body)}")
    elif framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
        body = chunks(body, cuts)
    return "\r\n".join([*lines, "\r\n"]).encode() + body


@pytest.fixture(params=["auto", "off"], ids=["fast", "asgi"])
async def fuzzed(request, make_worker, make_router):
    """A worker and a router for all examples of one test, with small limits so that they are met."""
    worker = await make_worker()
    limits = {
        "look_ahead_bytes": 1000,
        "buffered_body_bytes": 5000,
        "health_check_failure_threshold": 100_000,
        "max_attempts": 1,
    }
    return worker, await make_router(worker, hot_path=request.param, health_check_interval_s=60, **limits)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
async def test_any_framing_in_any_pieces_keeps_its_meaning(fuzzed, data):
    fields, answer_fields = data.draw(FIELDS), data.draw(FIELDS)
    body, answer = data.draw(BODIES), data.draw(BODIES)
    framing = data.draw(st.sampled_from(["length", "chunked", "close"]))
    cuts, wire_cuts, answer_cuts = data.draw(CUTS), data.draw(CUTS), data.draw(CUTS)

    async def behaviour(talk):
        for piece in pieces(message("HTTP/1.1 200 OK", answer_fields, answer, framing, cuts), answer_cuts):
            await talk.send(piece)
            await asyncio.sleep(0)
        if framing == "close":
            talk.writer.close()

    worker, router = fuzzed
    worker.behaviour = behaviour
    client = await router.connect()
    request = message("POST /x HTTP/1.1", fields, body, data.draw(st.sampled_from(["length", "chunked"])), cuts)
    for _ in range(2):
        for piece in pieces(request, wire_cuts):
            await client.send(piece)
            await asyncio.sleep(0)
        response = await client.response()
        assert (response.status, response.body, response.complete) == (200, answer, True)
        assert [field for field in response.headers if field[0].startswith("x-")] == answer_fields
        seen = worker.requests[-1]
        assert seen.body == body
        assert [field for field in seen.headers if field[0].startswith("x-")] == fields
    await router.settled()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
async def test_whoever_leaves_early_every_request_is_counted_once(fuzzed, data):
    answer = message("HTTP/1.1 200 OK", [], data.draw(BODIES), data.draw(st.sampled_from(["length", "chunked"])), [100])
    request = message(
        "POST /x HTTP/1.1", [], data.draw(BODIES), data.draw(st.sampled_from(["length", "chunked"])), [100]
    )
    worker_stops, client_stops = data.draw(st.integers(0, len(answer))), data.draw(st.integers(1, len(request)))

    async def behaviour(talk):
        await talk.send(answer[:worker_stops])
        if worker_stops < len(answer):
            talk.reset()

    worker, router = fuzzed
    worker.behaviour = behaviour
    leaver, stayer = await router.connect(), await router.connect()
    await leaver.send(request[:client_stops])
    await stayer.send(request)
    leaver.close()
    try:
        response = await stayer.response()
        assert (response.status == 200 and response.complete) == (worker_stops == len(answer))
    except (asyncio.IncompleteReadError, ConnectionError):
        assert worker_stops < len(answer)
    await router.settled()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.binary(min_size=1, max_size=300), st.integers(0, 20))
async def test_random_bytes_from_clients_do_no_harm(fuzzed, noise, keep):
    _, router = fuzzed
    client = await router.connect()
    await client.send(b"POST /x HTTP/1.1\r\n"[:keep] + noise)
    client.writer.write_eof()
    async with asyncio.timeout(10):
        answer = await client.reader.read()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    await router.until(lambda: not router.metrics.under_way)
    assert (await router.get("/health")).status == 200
