"""The control plane."""

from __future__ import annotations

import asyncio
import json
import urllib.parse

import pytest
from scripted_worker import answers_after


async def test_workers_are_added_listed_and_removed(make_worker, make_router):
    worker = await make_worker()
    router = await make_router()
    added = await router.post(f"/add_worker?url={worker.url}", b"")
    assert added.json() == {"status": "success", "worker_urls": {worker.url: 0}}
    await router.state(worker, "healthy")
    assert (await router.get("/list_workers")).json() == {"urls": [worker.url]}
    assert (await router.post()).status == 200
    removed = await router.post(f"/remove_worker?url={worker.url}", b"")
    assert removed.json() == {"status": "success", "worker_urls": {}, "not_drained": 0}
    assert (await router.get("/list_workers")).json() == {"urls": []}
    assert (await router.post()).status == 503


@pytest.mark.parametrize(
    "make",
    [
        lambda url: (f"/add_worker?worker_url={url}", b""),
        lambda url: (f"/add_worker?url={urllib.parse.quote(url, safe='')}&weight=2", b""),
        lambda url: ("/add_worker", json.dumps({"url": url, "weight": 2}).encode()),
        lambda url: ("/add_worker", json.dumps({"worker_url": url}).encode()),
        lambda url: ("/workers", json.dumps({"url": url, "worker_type": "regular"}).encode()),
    ],
)
async def test_every_spelling_of_adding_a_worker_works_and_repeats(make_worker, make_router, make):
    worker = await make_worker()
    router = await make_router()
    for _ in range(2):
        assert (await router.post(*make(worker.url))).status in (200, 202)
    await router.state(worker, "healthy")
    assert len(router.server.dispatcher.fleet) == 1


@pytest.mark.parametrize(
    ("target", "body", "says"),
    [
        ("/add_worker", b"", "expected"),
        ("/add_worker", b"[1]", "expected"),
        ("/add_worker", b"[" * 60_000, "expected"),
        ("/add_worker", b"{}", "missing"),
        ("/add_worker?url=nonsense", b"", "expected http"),
        ("/add_worker?url=http://a:1/x", b"", "without path"),
        ("/add_worker?url=http://a:1&weight=x", b"", "weight"),
        ("/add_worker?url=http://a:1&weight=0", b"", "weight"),
        ("/workers", b'{"url": "http://a:1", "worker_type": "prefill"}', "prefill"),
    ],
)
async def test_a_wrong_worker_is_refused_with_the_reason(make_router, target, body, says):
    router = await make_router()
    response = await router.post(target, body)
    assert response.status == 400
    assert says in response.body.decode()
    assert len(router.server.dispatcher.fleet) == 0


async def test_the_rest_form_of_workers(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker)
    listed = (await router.get("/workers")).json()
    assert listed["total"] == 1
    [described] = listed["workers"]
    assert (described["url"], described["state"], described["is_healthy"]) == (worker.url, "healthy", True)
    quoted = urllib.parse.quote(worker.url, safe="")
    for name in (described["id"], quoted):
        assert (await router.get(f"/workers/{name}")).json() == described
    client = await router.connect()
    await client.send(f"DELETE /workers/{described['id']} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert (await client.response()).status == 200
    assert (await router.get(f"/workers/{described['id']}")).status == 404
    assert (await router.post("/remove_worker?url=http://unknown:1", b"")).status == 404


async def test_removal_waits_for_requests_in_flight_and_sends_no_new_ones(make_worker, make_router):
    release = asyncio.Event()
    slow = answers_after(release, b"done")
    leaving, staying = await make_worker(slow), await make_worker()
    router = await make_router(leaving)
    waiting = [asyncio.create_task(router.post()) for _ in range(5)]
    await router.until(lambda: len(leaving.requests) == 5)
    await router.post(f"/add_worker?url={staying.url}", b"")
    await router.state(staying, "healthy")
    removing = asyncio.create_task(router.post(f"/remove_worker?url={leaving.url}", b""))
    await router.until(lambda: router.worker(leaving).draining)
    for _ in range(5):
        assert (await router.post()).status == 200
    assert (len(leaving.requests), removing.done()) == (5, False)
    release.set()
    assert [response.body for response in await asyncio.gather(*waiting)] == [b"done"] * 5
    assert (await removing).json()["not_drained"] == 0
    router.assert_settled()


async def test_removal_has_a_deadline_and_moves_or_ends_what_is_left(make_worker, make_router):
    async def hang(talk):
        await talk.client_left()

    async def stream(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await talk.client_left()

    worker = await make_worker(hang)
    router = await make_router(worker)
    alone = asyncio.create_task(router.post())
    await router.until(lambda: worker.requests)
    removed = await router.post(f"/remove_worker?url={worker.url}&timeout_s=0.05", b"")
    assert removed.json()["not_drained"] == 1
    response = await alone
    assert (response.status, "was removed" in response.body.decode()) == (502, True)

    streaming, good = await make_worker(stream), await make_worker()
    for one in (streaming, good):
        await router.post(f"/add_worker?url={one.url}", b"")
        await router.state(one, "healthy")
    responses = [asyncio.create_task(router.post()) for _ in range(2)]
    await router.until(lambda: len(streaming.requests) == 1)
    await asyncio.sleep(0.05)
    await router.post(f"/remove_worker?url={streaming.url}&timeout_s=0", b"")
    assert sorted(response.complete for response in await asyncio.gather(*responses)) == [False, True]
    router.assert_settled()


async def test_a_request_that_waits_moves_on_when_its_worker_is_removed(make_worker, make_router):
    async def hang(talk):
        await talk.client_left()

    stuck, good = await make_worker(hang), await make_worker()
    router = await make_router(stuck)
    waiting = asyncio.create_task(router.post())
    await router.until(lambda: stuck.requests)
    await router.post(f"/add_worker?url={good.url}", b"")
    await router.state(good, "healthy")
    await router.post(f"/remove_worker?url={stuck.url}&timeout_s=0", b"")
    assert (await waiting).status == 200
    router.assert_settled()


async def test_a_worker_added_again_while_draining_stays(make_worker, make_router):
    release = asyncio.Event()
    slow = answers_after(release)
    worker = await make_worker(slow)
    router = await make_router(worker)
    waiting = asyncio.create_task(router.post())
    await router.until(lambda: worker.requests)
    removing = asyncio.create_task(router.post(f"/remove_worker?url={worker.url}", b""))
    await router.until(lambda: router.worker(worker).draining)
    await router.post(f"/add_worker?url={worker.url}", b"")
    assert (await removing).json()["worker_urls"] == {worker.url: 1}
    release.set()
    assert (await waiting).status == 200
    assert (await router.post()).status == 200


@pytest.mark.parametrize("target", [f"/remove_worker?url={{url}}&timeout_s={wrong}" for wrong in ("soon", "nan", "-1")])
async def test_a_wrong_deadline_is_refused(make_worker, make_router, target):
    worker = await make_worker()
    router = await make_router(worker)
    assert (await router.post(target.format(url=worker.url), b"")).status == 400
    assert len(router.server.dispatcher.fleet) == 1


async def test_commands_go_to_every_worker_and_their_answers_are_combined(make_worker, make_router):
    async def behaviour(talk):
        await talk.answer(b'{"success": true, "n": 1}')

    async def text(talk):
        await talk.answer(b"Cache flushed.")

    workers = [await make_worker(behaviour), await make_worker(text)]
    router = await make_router(*workers)
    body = b'{"mode": "retract"}'
    response = await router.post("/pause_generation?x=1", body, "authorization: Bearer engine", "x-y: z")
    assert response.status == 200
    assert response.json() == {
        "success": True,
        "message": "",
        "workers": {
            workers[0].url: {"status": 200, "body": {"success": True, "n": 1}},
            workers[1].url: {"status": 200, "body": "Cache flushed."},
        },
    }
    for worker in workers:
        [seen] = worker.requests
        assert (seen.method, seen.target, seen.body) == ("POST", "/pause_generation?x=1", body)
        assert seen.header("authorization") == "Bearer engine"
        assert seen.header("x-y") == "z"
    assert (await router.get("/flush_cache")).status == 200
    assert [worker.requests[-1].method for worker in workers] == ["GET", "GET"]


async def test_an_answer_to_a_command_that_cannot_be_parsed_is_handed_on_as_text(make_worker, make_router):
    async def deep(talk):
        await talk.answer(b"[" * 100_000)

    worker = await make_worker(deep)
    response = await (await make_router(worker)).post("/flush_cache", b"")
    assert response.json()["workers"][worker.url] == {"status": 200, "body": "[" * 100_000}


async def test_a_failed_command_names_the_workers_that_failed(make_worker, make_router):
    async def no(talk):
        await talk.answer(b'{"success": false, "message": "not now"}')

    async def error(talk):
        await talk.send(b"HTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\n4\r\noops\r\n0\r\n\r\n")

    async def dies(talk):
        talk.reset()

    good, *bad = [await make_worker()] + [await make_worker(behaviour) for behaviour in (no, error, dies)]
    router = await make_router(good, *bad)
    response = await router.post("/continue_generation", b"{}")
    assert response.status == 502
    answer = response.json()
    assert answer["success"] is False
    assert f"{bad[0].url}: answered 200: not now" in answer["message"]
    assert f"{bad[1].url}: answered 500: oops" in answer["message"]
    assert answer["workers"][bad[2].url]["status"] is None
    assert good.url not in answer["message"]


async def test_quarantined_workers_get_no_commands(make_worker, make_router):
    up, down = await make_worker(), await make_worker()
    await down.kill()
    router = await make_router(up, down, ready=False)
    await router.state(up, "healthy")
    await router.state(down, "quarantined")
    assert list((await router.post("/flush_cache", b"")).json()["workers"]) == [up.url]
    await up.kill()
    await router.state(up, "quarantined")
    assert (await router.post("/flush_cache", b"")).status == 503


async def test_a_command_that_differs_by_worker_is_refused_for_several(make_worker, make_router):
    workers = [await make_worker(), await make_worker()]
    router = await make_router(*workers)
    assert (await router.post("/init_weights_update_group", b"{}")).status == 409
    assert not any(worker.requests for worker in workers)


async def test_bodies_of_control_requests_are_bounded(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker, max_body_bytes=1000)
    assert (await router.post("/update_weights_from_tensor", b"x" * 1001)).status == 413
    assert (await router.post("/add_worker", b" " * 70_000)).status == 413
    assert worker.requests == []


async def test_a_changed_weight_version_is_seen_after_a_command(make_worker, make_router):
    worker = await make_worker()
    worker.weight_version = "1"
    router = await make_router(worker, health_check_interval_s=60)
    worker.weight_version = "2"
    await router.post("/update_weight_version", b'{"new_version": "2"}')
    await router.until(lambda: router.server.dispatcher.fleet.weight_version == "2")


async def test_control_requests_need_the_token_and_do_not_pass_it_on(make_worker, make_router, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    worker = await make_worker()
    router = await make_router(worker, control_token_file=tmp_path / "token")
    bearer = "authorization: Bearer secret"
    for target in (
        "/list_workers",
        "/metrics",
        "/router/status",
        "/workers",
        "/flush_cache",
        "/%66lush_cache",
        "/workers/x",
    ):
        assert (await router.get(target)).status == 401
        assert (await router.get(target, "authorization: Bearer wrong")).status == 401
    assert worker.requests == []
    for target in ("/health", "/liveness", "/readiness", "/v1/models"):
        assert (await router.get(target)).status == 200
    assert (await router.get("/list_workers", bearer)).status == 200
    assert (await router.get("/flush_cache", bearer)).status == 200
    assert worker.requests[-1].header("authorization") is None
    await router.post("/generate", b"{}", "authorization: Bearer engine")
    assert worker.requests[-1].header("authorization") == "Bearer engine"


@pytest.mark.parametrize(
    "target", ["/flush_cache", "/%66lush_cache", "http://x/flush_cache", "/flush_cache?a=1", "/flush_cache#x"]
)
async def test_no_spelling_of_a_command_reaches_a_single_worker(make_worker, make_router, target):
    workers = [await make_worker(), await make_worker()]
    router = await make_router(*workers)
    assert (await router.get(target)).status == 200
    assert [len(worker.requests) for worker in workers] == [1, 1]


async def test_status_and_metrics_add_up(make_worker, make_router):
    async def behaviour(talk):
        await talk.answer(b"{}", 404 if talk.request.target == "/missing" else 200)

    worker = await make_worker(behaviour)
    router = await make_router(worker)
    for _ in range(3):
        await router.post()
    await router.get("/missing")
    status = (await router.get("/router/status")).json()
    assert status["requests"] == {"received": 4, "retried": 0, "answered": 4, "refused": 0, "cut": 0, "cancelled": 0}
    assert status["workers"][0]["answers"] == {"2xx": 3, "3xx": 0, "4xx": 1, "5xx": 0}
    text = (await router.get("/metrics")).body.decode()
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert samples["miles_router_requests_received_total"] == "4"
    assert samples['miles_router_requests_total{outcome="answered"}'] == "4"
    assert samples[f'miles_router_worker_answers_total{{worker="{worker.url}",status="4xx"}}'] == "1"
    assert samples[f'miles_router_worker_state{{worker="{worker.url}",state="healthy"}}'] == "1"
    assert samples['miles_router_request_duration_seconds_bucket{le="+Inf"}'] == "4"
    assert samples["miles_router_request_duration_seconds_count"] == "4"


async def test_a_worker_is_known_by_any_spelling_of_its_url(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker, await make_worker())
    for name in (worker.url, worker.url + "/", worker.url.upper()):
        assert (await router.get(f"/workers/{name}")).json()["url"] == worker.url
