"""A decode server that is a small application, in front of prefill servers that are others."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

import httpx
import pytest
from aiohttp import web
from served_app import ServedApp
from starlette.requests import Request

from miles.rollout.engines.sglang.environment import SERVER_PACKAGES

sys.path.insert(0, str(SERVER_PACKAGES))

from miles_sglang import pairing
from miles_sglang.pairing import Decode, Prefill

DEADLINE_S = 30.0
GENERATE = {"input_ids": [1, 2], "sampling_params": {}}


class PrefillServer(ServedApp):
    """Notes the requests; answers ``status`` when ``free``."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[dict[str, Any]] = []
        self.status = 200
        self.free = True
        self.arrived = threading.Semaphore(0)
        """Once for every request."""
        self.cut = threading.Event()
        """The other side gave a request up."""
        self.app.router.add_post("/{path:.*}", self._answer)

    async def _answer(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        self.arrived.release()
        nothing = asyncio.Event()
        while not self.free and request.transport is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(nothing.wait(), 0.01)
        if request.transport is None:
            self.cut.set()
        return web.json_response({"meta_info": {"input_token_logprobs": [[None, 1], [-0.5, 2]]}}, status=self.status)


class DecodeServer:
    """Answers with the request that it got, when a prefill server has it; with ``waits``, when its client has gone."""

    def __init__(self) -> None:
        self.waits = False
        self.partner: PrefillServer | None = None
        self.arrived, self.disconnected = asyncio.Event(), asyncio.Event()
        self.calls: list[str] = []

    async def __call__(self, scope, receive, send) -> None:
        client = Request(scope, receive)
        request = json.loads(await client.body() or b"null")
        self.calls.append(f"{scope['path']}?{scope['query_string'].decode()}")
        self.arrived.set()
        if self.waits and scope["path"] == "/generate":
            while not await client.is_disconnected():  # noqa: ASYNC110 - SGLang asks now and then too
                await asyncio.sleep(0)
            self.disconnected.set()
            return
        if self.partner is not None:
            assert await asyncio.to_thread(self.partner.arrived.acquire, timeout=DEADLINE_S)
        answer = {"request": request, "meta_info": {"input_token_logprobs": []}}
        length = str(len(json.dumps(answer))).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


class Client:
    """Sends a request by hand, and goes when it is told to."""

    def __init__(self, server: Decode | Prefill) -> None:
        self.goes = asyncio.Event()
        scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": []}
        self._body = iter([json.dumps(GENERATE).encode()])
        self.served = asyncio.create_task(server(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        for body in self._body:
            return {"type": "http.request", "body": body}
        await self.goes.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        pass


@pytest.fixture
def prefill():
    with PrefillServer() as server:
        yield server


@pytest.fixture
def decode():
    return DecodeServer()


@pytest.fixture
async def client(decode):
    transport = httpx.ASGITransport(Decode(decode))
    async with httpx.AsyncClient(transport=transport, base_url="http://decode", timeout=DEADLINE_S) as client:
        yield client


def known(*servers: PrefillServer) -> dict[str, Any]:
    return {"servers": [{"url": server.url, "host": "here", "port": 7 + i} for i, server in enumerate(servers)]}


async def test_a_request_gets_a_room_in_which_both_servers_meet(client, decode, prefill):
    decode.partner = prefill
    await client.post("/prefill_servers", json=known(prefill))
    first, second = [(await client.post("/generate", json=GENERATE)).json()["request"] for _ in range(2)]
    assert {name: first[name] for name in GENERATE} == GENERATE
    assert (first["bootstrap_host"], first["bootstrap_port"]) == ("here", 7)
    assert first["bootstrap_room"] != second["bootstrap_room"]
    assert prefill.requests == [{**first, "stream": False}, {**second, "stream": False}]


async def test_prefill_servers_take_turns(client, decode, prefill):
    with PrefillServer() as other:
        await client.post("/prefill_servers", json=known(prefill, other))
        for decode.partner in (prefill, other, prefill, other):
            await client.post("/v1/chat/completions", json={"messages": []})
        assert (len(prefill.requests), len(other.requests)) == (2, 2)


async def test_log_probabilities_of_the_prompt_are_the_prefill_servers(client, prefill):
    await client.post("/prefill_servers", json=known(prefill))
    scoring = {**GENERATE, "return_logprob": True, "logprob_start_len": 0}
    answer = (await client.post("/generate", json=scoring)).json()
    assert answer["meta_info"]["input_token_logprobs"] == [[None, 1], [-0.5, 2]]
    answer = (await client.post("/generate", json={**scoring, "logprob_start_len": -1})).json()
    assert answer["meta_info"]["input_token_logprobs"] == []


async def test_a_prefill_server_that_fails_costs_the_request_and_frees_the_decode_server(client, decode, prefill):
    await client.post("/prefill_servers", json=known(prefill))
    decode.waits, prefill.status = True, 500
    answer = await client.post("/generate", json=GENERATE)
    assert answer.status_code == 503
    assert "the prefill server failed" in answer.json()["error"]
    assert decode.disconnected.is_set()


async def test_a_prefill_server_that_is_gone_costs_the_request(client, decode):
    decode.waits = True
    await client.post("/prefill_servers", json={"servers": [{"url": "http://127.0.0.1:9", "host": "a", "port": 1}]})
    assert (await client.post("/generate", json=GENERATE)).status_code == 503


async def test_what_a_prefill_server_has_against_a_request_is_the_answer(client, decode, prefill):
    await client.post("/prefill_servers", json=known(prefill))
    decode.waits, prefill.status = True, 400
    assert (await client.post("/generate", json=GENERATE)).status_code == 400


async def test_a_prompt_of_which_the_prefill_server_says_nothing_costs_the_request(client, decode, prefill):
    await client.post("/prefill_servers", json=known(prefill))
    prefill.status = 500
    scoring = {**GENERATE, "return_logprob": True, "logprob_start_len": 0}
    assert (await client.post("/generate", json=scoring)).status_code == 503


async def test_a_prefill_server_that_is_gone_is_asked_no_more(client, decode, prefill):
    gone = {"url": "http://127.0.0.1:9", "host": "a", "port": 1}
    await client.post("/prefill_servers", json={"servers": [gone, *known(prefill)["servers"]]})
    decode.waits = True
    assert (await client.post("/generate", json=GENERATE)).status_code == 503
    decode.waits, decode.partner = False, prefill
    for _ in range(3):
        assert (await client.post("/generate", json=GENERATE)).status_code == 200
    assert len(prefill.requests) == 3


async def test_what_nobody_waits_for_is_taken_back_from_the_prefill_server(client, decode, prefill):
    await client.post("/prefill_servers", json=known(prefill))
    decode.partner, prefill.free = prefill, False
    assert (await client.post("/generate", json=GENERATE)).status_code == 200
    assert await asyncio.to_thread(prefill.cut.wait, DEADLINE_S)


async def test_without_a_prefill_server_a_request_waits_for_one(client, prefill):
    waiting = asyncio.create_task(client.post("/generate", json=GENERATE))
    await client.post("/prefill_servers", json=known())
    assert not waiting.done()
    await client.post("/prefill_servers", json=known(prefill))
    assert (await waiting).status_code == 200


async def test_without_a_prefill_server_a_request_is_refused_in_the_end(client, monkeypatch):
    monkeypatch.setattr(pairing, "_PATIENCE_S", 0.01)
    assert (await client.post("/generate", json=GENERATE)).status_code == 503


async def test_what_is_no_object_is_refused(client, prefill):
    await client.post("/prefill_servers", json=known(prefill))
    assert (await client.post("/generate", content=b"[1")).status_code == 400
    assert (await client.post("/generate", json=[1])).status_code == 400


async def test_what_generates_nothing_is_the_servers_own(client, prefill):
    await client.post("/prefill_servers", json=known(prefill))
    assert (await client.post("/flush_cache", json={})).json()["request"] == {}
    assert not prefill.requests


async def test_what_somebody_else_has_paired_is_left_alone(client, prefill):
    await client.post("/prefill_servers", json=known(prefill))
    paired = {**GENERATE, "bootstrap_host": "there", "bootstrap_port": 1, "bootstrap_room": 2}
    assert (await client.post("/generate", json=paired)).json()["request"] == paired
    assert not prefill.requests


async def test_a_prefill_server_answers_for_itself_what_is_not_paired(decode):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(Prefill(decode)), base_url="http://prefill") as client:
        alone = (await client.post("/generate", json=GENERATE)).json()["request"]
        assert alone == {**GENERATE, "bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
        paired = {**GENERATE, "bootstrap_host": "there", "bootstrap_room": 2}
        assert (await client.post("/generate", json=paired)).json()["request"] == paired


async def test_a_client_that_goes_takes_its_request_along(decode, prefill):
    server = Decode(decode)
    decode.waits, prefill.free = True, False
    async with httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://decode") as control:
        await control.post("/prefill_servers", json=known(prefill))
    client = Client(server)
    assert await asyncio.to_thread(prefill.arrived.acquire, timeout=DEADLINE_S)
    client.goes.set()
    await asyncio.wait_for(client.served, DEADLINE_S)
    assert decode.disconnected.is_set()
    assert await asyncio.to_thread(prefill.cut.wait, DEADLINE_S)


@pytest.mark.parametrize("kind", [Decode, Prefill])
async def test_before_a_pause_ends_what_nobody_waits_for(decode, kind):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(kind(decode)), base_url="http://server") as control:
        answer = await control.post("/pause_generation", json={"mode": "retract"})
        assert answer.json()["request"] == {"mode": "retract"}
        assert decode.calls == ["/flush_cache?timeout=60", "/pause_generation?"]
        await control.post("/pause_generation", json={"mode": "in_place"})
        assert decode.calls[2:] == ["/pause_generation?"]


async def test_a_pause_waits_for_nothing_that_somebody_waits_for(decode):
    server = Prefill(decode)
    decode.waits = True
    client = Client(server)
    await asyncio.wait_for(decode.arrived.wait(), DEADLINE_S)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://server") as control:
        await control.post("/pause_generation", json={"mode": "retract"})
        assert decode.calls == ["/generate?", "/pause_generation?"]
        client.goes.set()
        await asyncio.wait_for(client.served, DEADLINE_S)
        await control.post("/pause_generation", json={"mode": "retract"})
        assert decode.calls[2:] == ["/flush_cache?timeout=60", "/pause_generation?"]


def test_a_worker_registers_when_there_is_somebody_to_register_with():
    registered = []
    with socket.socket() as later:
        later.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{later.getsockname()[1]}/route"
        register = pairing.when_listening(lambda *arguments: registered.append(arguments))
        worker = threading.Thread(target=register, args=("manager", url, {}))
        worker.start()
        assert not registered
        later.listen()
        worker.join(DEADLINE_S)
    assert registered == [("manager", url, {})]


def test_a_worker_that_has_waited_long_enough_registers_in_any_case(monkeypatch):
    monkeypatch.setattr(pairing, "_PATIENCE_S", 0.0)
    registered = []
    pairing.when_listening(lambda *arguments: registered.append(arguments))("manager", "http://127.0.0.1:9/route", {})
    assert registered
