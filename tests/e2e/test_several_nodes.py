"""A trainer on two nodes of a Ray cluster: its engines are reached over the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def cluster():
    """Two nodes on this machine; neither holds both ranks and the rollout side."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_ranks_of_two_nodes_send_their_weights_to_engines_of_one(cluster, toy, miles, tmp_path: Path):
    run = tmp_path / "run"
    nodes = ["--ray-address", cluster.address, "--actor-num-nodes", "2", "--num-rollout", "2", "--save-interval", "2"]
    miles("train", *toy.flags(run, *nodes))
    steps = [
        event["metrics"] for line in (run / "metrics.jsonl").open() if (event := json.loads(line))["kind"] == "train"
    ]
    assert len(steps) == 4
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-4 for step in steps[::2])
