"""Runs on two nodes of a Ray cluster: trainer and engines are where there is room, and reach each other."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SECOND_NODE = "127.0.0.2"
FIRST_SAMPLE_OF_ROLLOUT_1 = 16
NUM_CPUS = 4
DEADLINE_S = 60


@pytest.fixture(scope="module")
def two_nodes():
    """Two nodes on this machine, with room for two processes each: a run of four needs both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("LETHAL_SIGNAL", "SIGKILL")
        patch.setenv("LETHAL_SAMPLE", str(FIRST_SAMPLE_OF_ROLLOUT_1))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=2, node_ip_address=SECOND_NODE)
            ray.init(address=cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def cluster(two_nodes):
    """Both nodes, when the run before has left them."""
    deadline = time.monotonic() + DEADLINE_S
    while ray.available_resources().get("CPU") != NUM_CPUS:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return two_nodes


def events(run: Path, kind: str) -> list[dict]:
    return [event["metrics"] for line in (run / "metrics.jsonl").open() if (event := json.loads(line))["kind"] == kind]


def test_ranks_of_two_nodes_send_their_weights_to_an_engine_on_one(cluster, toy, miles, tmp_path: Path):
    run = tmp_path / "run"
    nodes = ["--ray-address", cluster.address, "--actor-num-nodes", "2", "--num-rollout", "2", "--save-interval", "2"]
    miles("train", *toy.flags(run, *nodes, "--update-weight-transport", "broadcast"))
    steps = events(run, "train")
    assert len(steps) == 4
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-4 for step in steps[::2])


def test_engines_are_on_both_nodes_and_a_killed_one_is_replaced(cluster, toy, miles, tmp_path: Path):
    run = tmp_path / "run"
    nodes = ["--ray-address", cluster.address, "--rollout-num-engines", "2", "--update-weight-transport", "broadcast"]
    lethal = ["--use-fault-tolerance", "--custom-generate-function-path", "lethal_generate.generate"]
    # A rollout may end before the loss is noticed; the next one cannot begin before the place is taken.
    length = ["--num-rollout", "3", "--save-interval", "3", "--rollout-max-response-len", "100"]
    done = miles("train", *toy.flags(run, *nodes, *lethal, *length))
    logs = [(run / "logs" / f"engine-{index}.log").read_text() for index in range(2)]
    assert sum(f"http://{SECOND_NODE}:" in log for log in logs) == 1
    assert "engine 0 has ended with status -9 (SIGKILL)" in done.stdout + done.stderr
    assert sum(log.count(" of the Ray cluster") for log in logs) == 3  # two, and the one that took a place
    assert sum(metrics["rollout/engine_restarts"] for metrics in events(run, "rollout")) == 1
    for rollout_id in range(3):
        rows = map(json.loads, (run / "rollouts" / f"rollout_{rollout_id:07d}.jsonl").open())
        assert sorted(row["index"] for row in rows) == list(range(16 * rollout_id, 16 * rollout_id + 16))
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-4 for step in events(run, "train")[::2])


def test_engines_for_which_there_is_no_room_are_told_before_anything_starts(cluster, toy, miles, tmp_path: Path):
    run = tmp_path / "run"
    nodes = ["--ray-address", cluster.address, "--rollout-num-engines", "3"]
    done = miles("train", *toy.flags(run, *nodes), check=False)
    assert done.returncode != 0
    assert "this run takes 5 CPU of Ray's, and the cluster has 4" in done.stderr
    assert "3 for engines (--rollout-num-engines)" in done.stderr
    assert not list((run / "logs").iterdir())
