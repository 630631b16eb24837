"""A run whose trajectories are made by a service of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from killing import DEADLINE_S

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(DEADLINE_S)]

SERVICE = Path(__file__).parents[2] / "tools" / "rollout_buffer" / "service.py"


@pytest.fixture
def service():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVICE), "--port", str(port)])
    try:
        wait_until_it_listens(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_until_it_listens(process: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)


def test_trajectories_of_a_service_are_trained_on_by_their_token_ids(toy, miles, tmp_path, service):
    run = tmp_path / "run"
    flags = ["--rollout-buffer-url", service, "--disable-rollout-global-dataset", "--rollout-task-type", "length"]
    flags += ["--eval-interval", "100"]
    miles("train", *toy.flags(run, *flags))
    rows = [json.loads(line) for path in sorted((run / "rollouts").glob("rollout_*")) for line in path.open()]
    assert len(rows) == 4 * 16
    assert set(Counter(row["metadata"]["instance_id"] for row in rows).values()) == {4}, "every prompt once"
    events = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    steps = [event["metrics"] for event in events if event["kind"] == "train"]
    assert steps[0]["train/train_rollout_logprob_abs_diff"] < 1e-5, "engine and trainer mean the same tokens"
