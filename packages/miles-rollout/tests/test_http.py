from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from rollout_fakes import FakeServer, Payload, answer

from miles.core.errors import EngineError
from miles.rollout import http
from miles.rollout.http import JsonClient, RequestError

PAYLOAD: Payload = {"input_ids": [1], "sampling_params": {}}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(http, "MAX_BACKOFF_S", 0.002)


def in_turn(*answers: Any) -> Any:
    left = list(answers)
    return lambda payload: left.pop(0) if left else answer(payload)


async def test_an_answer_is_parsed_and_headers_are_sent(server: FakeServer) -> None:
    client = JsonClient(server.url, deadline_s=10)
    found = await client.post("/generate", PAYLOAD, {"X-SMG-Routing-Key": "k"})
    await client.close()
    assert found == answer(PAYLOAD)
    assert server.headers[0]["X-SMG-Routing-Key"] == "k"
    assert server.headers[0]["Content-Type"] == "application/json"


async def test_server_errors_are_tried_again(server: FakeServer) -> None:
    server.respond = in_turn(503, 500)
    client = JsonClient(server.url, deadline_s=10)
    assert await client.post("/generate", PAYLOAD) == answer(PAYLOAD)
    await client.close()
    assert len(server.payloads) == 3
    assert client.num_retries == 2


async def test_a_refused_request_is_not_tried_again(server: FakeServer) -> None:
    server.respond = in_turn(400)
    client = JsonClient(server.url, deadline_s=10)
    with pytest.raises(RequestError, match="answered 400: as the test wants"):
        await client.post("/generate", PAYLOAD)
    await client.close()
    assert len(server.payloads) == 1


async def test_attempts_are_bounded(server: FakeServer) -> None:
    server.respond = lambda payload: 500
    client = JsonClient(server.url, deadline_s=10, attempts=4)
    with pytest.raises(EngineError, match="no answer after 4 attempts"):
        await client.post("/generate", PAYLOAD)
    await client.close()
    assert len(server.payloads) == 4


async def test_nobody_listening_is_an_engine_error() -> None:
    client = JsonClient("http://127.0.0.1:9", deadline_s=10, attempts=2)
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9/generate: no answer after 2 attempts"):
        await client.post("/generate", PAYLOAD)
    await client.close()


async def test_the_deadline_ends_a_request_that_hangs(server: FakeServer) -> None:
    server.hold = lambda payload: True
    client = JsonClient(server.url, deadline_s=0.2, attempts=100)
    with pytest.raises(EngineError, match="TimeoutError"):
        await client.post("/generate", PAYLOAD)
    await client.close()


async def test_connections_are_reused(server: FakeServer) -> None:
    client = JsonClient(server.url, deadline_s=10)
    for _ in range(5):
        await client.post("/generate", PAYLOAD)
    assert client._session is not None
    assert client._session.connector is not None
    assert sum(len(found) for found in client._session.connector._conns.values()) == 1  # type: ignore[attr-defined]
    await client.close()
