"""remote_rm against a real server that misbehaves on demand."""

import asyncio
import contextlib
import json
import os
import signal
import time

import pytest
from aiohttp import web

from miles.core.types import Sample
from miles.rewards import senders
from miles.rewards.context import Settings
from miles.rewards.types.remote import RemoteScorer


@contextlib.asynccontextmanager
async def service(*behaviours, **settings):
    """A server that treats its n-th request as the n-th behaviour says, and the last behaviour for ever."""
    requests = []

    async def handle(request):
        requests.append(await request.json())
        behaviour = behaviours[min(len(requests), len(behaviours)) - 1]
        return await behaviour(request) if callable(behaviour) else web.json_response(behaviour)

    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    scorer = RemoteScorer(Settings(url=f"http://127.0.0.1:{port}/", **settings))
    try:
        yield scorer, requests
    finally:
        await scorer.close()
        await runner.cleanup()


def answer(status, text="", **headers):
    async def respond(request):
        return web.Response(status=status, text=text, headers=headers)

    return respond


async def drop(request):
    request.transport.close()
    return web.Response()


async def never(request):
    await asyncio.sleep(60)
    return web.Response()


SAMPLE = Sample(prompt="1+1", response="2 \ud800", label="2", metadata={"source": "here"})


async def test_the_request_holds_prompt_response_label_and_metadata():
    async with service(0.5) as (scorer, requests):
        outcome = await scorer.score(SAMPLE)
    assert (outcome.score, outcome.failed) == (0.5, False)
    assert requests == [{"prompt": "1+1", "response": "2 \ud800", "label": "2", "metadata": {"source": "here"}}]


async def test_several_processes_send_and_none_is_left():
    async with service(1.0, num_senders=2) as (scorer, requests):
        outcomes = await asyncio.gather(*(scorer.score(Sample(response=str(i), label="2")) for i in range(20)))
        pids = [sender._child.process.pid for sender in scorer._service._senders]
    assert [outcome.score for outcome in outcomes] == [1.0] * 20
    assert sorted(int(request["response"]) for request in requests) == list(range(20))
    assert len(set(pids)) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_sending_process_that_is_killed_fails_what_it_had_in_hand_and_is_started_again():
    arrived = asyncio.Event()

    async def hold(request):
        arrived.set()
        return await never(request)

    async with service(hold, 1.0, num_senders=1) as (scorer, _):
        lost = asyncio.create_task(scorer.score(SAMPLE))
        await asyncio.wait_for(arrived.wait(), 30)
        os.kill(scorer._service._senders[0]._child.process.pid, signal.SIGKILL)
        outcome = await lost
        assert (outcome.category, outcome.failed) == ("remote_error", True)
        assert "ended with status -9" in outcome.detail
        assert (await scorer.score(SAMPLE)).score == 1.0


async def test_an_answer_longer_than_a_line_may_be_leaves_nobody_waiting(monkeypatch):
    monkeypatch.setattr(senders, "MAX_LINE_BYTES", 1000)
    async with service({"score": 1.0, "why": "x" * 5000}, 1.0, num_senders=1) as (scorer, _):
        outcome = await scorer.score(SAMPLE)
        assert (outcome.category, outcome.failed) == ("remote_error", True)
        assert (await scorer.score(SAMPLE)).score == 1.0


async def test_mappings_are_rewards():
    async with service({"score": 1.0, "why": "right"}) as (scorer, _):
        assert (await scorer.score(SAMPLE)).score == {"score": 1.0, "why": "right"}


@pytest.mark.parametrize(
    "trouble", [answer(500), answer(429, **{"Retry-After": "0.01"}), answer(503), answer(408), drop]
)
async def test_what_may_pass_is_tried_again(trouble):
    async with service(trouble, trouble, 1.0) as (scorer, requests):
        assert (await scorer.score(SAMPLE)).score == 1.0
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("trouble", "detail"),
    [
        (answer(400, "no label"), "answered 400: no label"),
        (answer(404), "404"),
        (answer(200, "<html>"), "not JSON: <html>"),
        (answer(200, "[" * 100_000), "not JSON: [["),
    ],
)
@pytest.mark.parametrize("num_senders", [0, 1])
async def test_what_will_not_pass_fails_at_once(trouble, detail, num_senders):
    async with service(trouble, num_senders=num_senders) as (scorer, requests):
        outcome = await scorer.score(SAMPLE)
    assert (outcome.category, outcome.failed) == ("remote_error", True)
    assert detail in outcome.detail
    assert len(requests) == 1


@pytest.mark.parametrize(
    "junk",
    ["good", None, [1, 2, 3], float("nan"), 10**400, {"score": 10**400}],
    ids=["text", "nothing", "list", "nan", "beyond-floats", "entry-beyond-floats"],
)
async def test_an_answer_that_is_no_reward_is_a_bad_score(junk):
    async with service(answer(200, json.dumps(junk))) as (scorer, _):
        assert (await scorer.score(SAMPLE)).category == "bad_score"


@pytest.mark.parametrize("trouble", [answer(500), never, answer(429, **{"Retry-After": "1000"})])
async def test_the_deadline_covers_all_attempts(trouble):
    async with service(trouble, timeout_s=0.5) as (scorer, _):
        started = time.perf_counter()
        outcome = await scorer.score(SAMPLE)
        assert time.perf_counter() - started < 30
    assert outcome.category == "remote_error"
    assert "gave up after 0.5 s" in outcome.detail


async def test_a_service_that_asks_for_no_patience_is_not_flooded():
    async with service(answer(503, **{"Retry-After": "0"}), timeout_s=1.0) as (scorer, requests):
        outcome = await scorer.score(SAMPLE)
    assert outcome.category == "remote_error"
    assert len(requests) <= 20


@pytest.mark.parametrize("num_senders", [0, 1])
async def test_requests_go_through_the_proxy(num_senders):
    seen = []

    async def forward(request):
        seen.append((request.headers["Host"], await request.json()))
        return web.json_response(1.0)

    async with service(forward) as (direct, _):
        proxy = direct._service._url
        scorer = RemoteScorer(Settings(url="http://reward.invalid/", http_proxy=proxy, num_senders=num_senders))
        outcome = await scorer.score(SAMPLE)
        await scorer.close()
    assert outcome.score == 1.0
    assert [host for host, _ in seen] == ["reward.invalid"]


async def test_a_service_that_is_not_there_is_named():
    scorer = RemoteScorer(Settings(url="http://127.0.0.1:9/", timeout_s=0.2))
    outcome = await scorer.score(SAMPLE)
    await scorer.close()
    assert "http://127.0.0.1:9/" in outcome.detail


async def test_concurrency_is_bounded():
    busy, most = 0, 0

    async def slow(request):
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.01)
        busy -= 1
        return web.json_response(1.0)

    async with service(slow, concurrency=3) as (scorer, _):
        outcomes = await asyncio.gather(*(scorer.score(SAMPLE) for _ in range(20)))
    assert [outcome.score for outcome in outcomes] == [1.0] * 20
    assert most == 3


async def test_one_sample_that_cannot_be_sent_fails_alone():
    async with service(1.0) as (scorer, _):
        outcomes = [await scorer.score(sample) for sample in (Sample(label=object()), SAMPLE)]
    assert [outcome.category for outcome in outcomes] == ["error", "scored"]
