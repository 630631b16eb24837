"""With ``--use-fault-tolerance`` an engine may die or hang: the run learns what it would have learned without that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

FIRST_SAMPLE_OF_ROLLOUT_1 = 16
FLAGS = ["--use-fault-tolerance", "--num-rollout", "3", "--rollout-max-response-len", "200", "--save-interval", "3"]


@pytest.fixture(scope="module")
def train(toy, miles):
    """Train with an engine that gets ``signal`` while ``sample`` is generated; the output."""
    place = str(Path(__file__).parent)
    harming = ["--custom-generate-function-path", "lethal_generate.generate"]

    def run(directory: Path, *flags: str, signal: str = "", sample: int = -1) -> str:
        lethal = {"PYTHONPATH": place, "LETHAL_SIGNAL": signal, "LETHAL_SAMPLE": str(sample)}
        done = miles("train", *toy.flags(directory, *FLAGS, *harming, *flags), **lethal)
        return done.stdout + done.stderr

    return run


def events(run: Path, kind: str) -> list[dict]:
    return [event for line in (run / "metrics.jsonl").open() if (event := json.loads(line))["kind"] == kind]


def restarts(run: Path) -> float:
    return sum(event["metrics"]["rollout/engine_restarts"] for event in events(run, "rollout"))


def samples(run: Path, rollout_id: int) -> list[tuple]:
    rows = map(json.loads, (run / "rollouts" / f"rollout_{rollout_id:07d}.jsonl").open())
    return [(row["index"], row["tokens"], row["rollout_log_probs"], row["weight_versions"]) for row in rows]


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run)
    assert restarts(run) == 0
    return run


def assert_equal_runs(run: Path, other: Path) -> None:
    for rollout_id in range(3):
        assert samples(run, rollout_id) == samples(other, rollout_id)
    assert [event["metrics"] for event in events(run, "train")] == [
        event["metrics"] for event in events(other, "train")
    ]


@pytest.mark.parametrize("num_engines", [1, 2])
def test_a_killed_engine_is_replaced_and_nothing_is_lost_or_trained_twice(train, undisturbed, tmp_path, num_engines):
    run = tmp_path / "run"
    engines = ["--rollout-num-engines", str(num_engines)]
    output = train(run, *engines, signal="SIGKILL", sample=FIRST_SAMPLE_OF_ROLLOUT_1)
    assert restarts(run) == 1
    assert "engine 0 has ended with status -9 (SIGKILL)" in output
    assert_equal_runs(run, undisturbed)


def test_a_hanging_engine_is_ended_and_replaced(train, undisturbed, tmp_path):
    run = tmp_path / "run"
    quick = ["--rollout-health-check-interval", "0.5", "--rollout-health-check-timeout", "5"]
    output = train(run, *quick, signal="SIGSTOP", sample=FIRST_SAMPLE_OF_ROLLOUT_1)
    assert restarts(run) == 1
    assert "/health_generate did not answer within 5 s" in output
    assert_equal_runs(run, undisturbed)


def test_beside_training_a_new_engine_gets_the_weights_that_the_others_have(train, tmp_path):
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    train(undisturbed, "--async-training")
    train(run, "--async-training", signal="SIGKILL", sample=FIRST_SAMPLE_OF_ROLLOUT_1)
    assert restarts(run) == 1
    assert {version for row in samples(run, 1) for version in row[3]} == {"0"}
    assert_equal_runs(run, undisturbed)
