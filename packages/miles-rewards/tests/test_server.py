import asyncio
import re
import signal
import subprocess
import sys

import pytest

from miles.core.errors import ConfigError
from miles.core.types import Sample
from miles.rewards.context import Settings
from miles.rewards.pool.backlog import Backlog
from miles.rewards.types.remote import RemoteScorer

testclient = pytest.importorskip("starlette.testclient")
server = pytest.importorskip("miles.rewards.server")

RIGHT = {"prompt": "?", "response": r"\boxed{42}", "label": "42"}


@pytest.fixture(scope="module")
def client():
    app = server.create_app(["math", "gpqa"], Settings(num_workers=1), server.Limits(body_bytes=10_000, batch=3))
    with testclient.TestClient(app) as client:
        yield client


def test_the_bare_reward(client):
    assert client.post("/", json=RIGHT).json() == 1.0


def test_the_outcome(client):
    graded = client.post("/grade", json=RIGHT | {"label": "41"}).json()
    assert (graded["score"], graded["category"], graded["failed"]) == (0.0, "wrong", False)


def test_a_batch(client):
    graded = client.post("/grade/batch", json={"items": [RIGHT, RIGHT | {"label": None}]}).json()
    assert [(item["score"], item["category"]) for item in graded] == [(1.0, "correct"), (0.0, "bad_label")]


def test_a_failure_is_no_bare_reward(client):
    answer = client.post("/", json=RIGHT | {"label": None})
    assert answer.status_code == 422
    assert answer.json()["detail"]["category"] == "bad_label"


def test_the_request_chooses_among_the_types_on_offer(client):
    item = {"response": "Answer: B", "label": "B", "rm_type": "gpqa"}
    assert client.post("/", json=item).json() == 1.0
    refused = client.post("/", json=item | {"rm_type": "os:system"})
    assert (refused.status_code, refused.json()["detail"]) == (
        422,
        "rm_type 'os:system' is not offered; this service grades math, gpqa",
    )


def test_sizes_are_limited(client):
    assert client.post("/", json=RIGHT | {"response": "x" * 20_000}).status_code == 413
    assert client.post("/", content=(b"x" * 1000 for _ in range(20))).status_code == 413
    assert client.post("/grade/batch", json={"items": [RIGHT] * 4}).status_code == 413


def test_malformed_requests_are_refused(client):
    assert client.post("/", content=b"{").status_code == 422
    assert client.post("/", json={"label": "42"}).status_code == 422


def test_health_metrics_and_description(client):
    assert client.get("/health").json() == {"status": "ok", "types": ["math", "gpqa"]}
    metrics = client.get("/metrics").text
    assert 'miles_rewards_graded_total{category="correct"} ' in metrics
    assert 'miles_rewards_seconds_bucket{category="bad_label",le="+Inf"} ' in metrics
    assert "miles_rewards_workers_replaced_total 0" in metrics
    assert "/grade/batch" in client.get("/openapi.json").json()["paths"]


def test_a_service_whose_pool_broke_is_not_healthy(monkeypatch):
    def break_down(backlog, share):
        raise MemoryError("no room")

    monkeypatch.setattr(Backlog, "take", break_down)
    with testclient.TestClient(server.create_app(["math"], Settings(num_workers=1))) as client:
        assert client.get("/health").status_code == 200
        assert client.post("/grade", json=RIGHT | {"response": "x" * 200_000}).json()["category"] == "error"
        health = client.get("/health")
    assert health.status_code == 503
    assert "no room" in health.json()["detail"]


def test_a_type_that_does_not_exist_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="Did you mean 'math'"):
        server.create_app(["mth"], Settings())


def test_the_service_is_the_other_end_of_remote_rm():
    command = [sys.executable, "-m", "miles.rewards.cli", "serve", "--type", "math", "--port", "0", "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+:\d+", line)))

            async def ask():
                scorer = RemoteScorer(Settings(url=url))
                try:
                    return [await scorer.score(Sample(**RIGHT | {"label": label})) for label in ("42", "41", None)]
                finally:
                    await scorer.close()

            outcomes = asyncio.run(ask())
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert [outcome.score for outcome in outcomes] == [1.0, 0.0, 0.0]
    assert outcomes[2].category == "remote_error"
    assert "bad_label" in outcomes[2].detail
