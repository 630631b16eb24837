"""However weights reach the engine, whole or as changes, the run learns the same, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def train(toy, miles, run: Path, *flags: str) -> list[dict]:
    """Metrics of the rollouts of a short run."""
    miles("train", *toy.flags(run, "--num-rollout", "3", "--save-interval", "3", *flags))
    return [
        event["metrics"] for line in (run / "metrics.jsonl").open() if (event := json.loads(line))["kind"] == "rollout"
    ]


def samples(run: Path) -> list[tuple]:
    rows = map(json.loads, (run / "rollouts" / "rollout_0000002.jsonl").open())
    return [(row["index"], row["tokens"], row["rollout_log_probs"], row["weight_versions"]) for row in rows]


@pytest.fixture(scope="module")
def plain(toy, miles, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    metrics = train(toy, miles, run, "--check-weight-update-equal", "--update-weight-probe-interval", "1")
    assert all(one["perf/weight_probe_abs_diff"] < 1e-5 for one in metrics)
    assert all(one["perf/update_weights_density"] == 1 for one in metrics)
    assert metrics[0].keys() >= {f"perf/update_weights_{phase}_time" for phase in ("pause", "send", "check", "probe")}
    return run


@pytest.mark.parametrize("transport", ["shm", "broadcast", "disk"])
def test_changes_over_any_transport_are_the_weights_themselves(toy, miles, plain, tmp_path, transport):
    run = tmp_path / "run"
    flags = ["--update-weight-transport", transport, "--update-weight-delta", "--lr", "1e-2"]
    train(toy, miles, run, *flags)
    assert samples(run) == samples(plain)


def test_small_steps_in_half_precision_change_little(toy, miles, tmp_path):
    run = tmp_path / "run"
    metrics = train(
        toy, miles, run, "--update-weight-delta", "--train-dtype", "bf16", "--lr", "1e-6", "--sglang-dtype", "bfloat16"
    )
    assert metrics[0]["perf/update_weights_density"] == 1
    assert 0 < metrics[2]["perf/update_weights_density"] < 0.05
