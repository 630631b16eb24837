"""Training while the next rollout is generated: it learns, and a kill at any moment costs nothing that is counted."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

import pytest
from conftest import MILES
from killing import DEADLINE_S, exported_weights, killed_run, last_checkpoint, metrics, samples

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(DEADLINE_S)]


def command(toy, run: Path, *flags: str) -> list[str]:
    return [MILES, "train-async", *toy.flags(run, "--save-hf", str(run / "hf" / "{rollout_id}"), "--use-tis", *flags)]


def rollout_events(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").open())
    return [line["metrics"] for line in lines if line["kind"] == "rollout"]


def trained_groups(run: Path) -> list[int]:
    """Indices of the prompts of every rollout that was trained on."""
    groups = []
    for path in sorted((run / "rollouts").glob("rollout_*.jsonl")):
        groups += sorted({json.loads(line)["group_index"] for line in path.open()})
    return groups


@pytest.fixture(scope="module")
def uninterrupted(toy, miles, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    miles(*command(toy, run, "--eval-async")[1:])
    return run


def test_every_rollout_is_made_with_the_weights_before_the_newest(uninterrupted):
    versions = {
        path.name: {version for line in path.open() for version in json.loads(line)["weight_versions"]}
        for path in (uninterrupted / "rollouts").glob("rollout_*.jsonl")
    }
    assert [versions[f"rollout_{number:07d}.jsonl"] for number in range(4)] == [{"0"}, {"0"}, {"1"}, {"2"}]
    assert [event["rollout/avg_staleness"] for event in rollout_events(uninterrupted)] == [0, 1, 1, 1]


MOMENTS = {
    "training on the third rollout": lambda run: last_checkpoint(run) == "1",
    "writing the third checkpoint": lambda run: any(run.glob(".iter_0000002.*.partial")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_continues_bit_for_bit(toy, miles, tmp_path, uninterrupted, moment):
    run = killed_run(lambda run: command(toy, run, "--eval-async"), tmp_path, MOMENTS[moment], checkpoint="1")
    miles(*command(toy, run, "--eval-async")[1:])
    assert metrics(run) == metrics(uninterrupted)
    assert samples(run) == samples(uninterrupted)
    expected, found = exported_weights(uninterrupted), exported_weights(run)
    assert all((expected[name] == found[name]).all() for name in expected)


@pytest.mark.slow
def test_asynchronous_run_under_ray_trains_on_the_same_samples(toy, miles, tmp_path, uninterrupted):
    run = tmp_path / "ray"
    miles(*command(toy, run, "--eval-async", "--executor", "ray")[1:])
    assert samples(run) == samples(uninterrupted)


CONTINUOUS = ["--rollout-function-path", "fully_async_rollout.generate_rollout_fully_async", "--num-rollout", "6"]


def test_killed_continuous_run_trains_on_every_prompt_once(toy, miles, tmp_path):
    run = killed_run(
        lambda run: command(toy, run, *CONTINUOUS), tmp_path, lambda run: last_checkpoint(run) == "2", checkpoint="2"
    )
    miles(*command(toy, run, *CONTINUOUS)[1:])
    groups = trained_groups(run)
    assert len(groups) == 6 * 4
    assert max(Counter(groups).values()) == 1, "a prompt was trained on twice"
    last = run / "iter_0000005" / "rollout"
    drawn = json.loads((last / "data_source.json").read_text())
    in_stream = [group[0]["group_index"] for group in json.loads((last / "stream.json").read_text())]
    given_back = [group[0]["group_index"] for group in drawn["buffer"]]
    assert sorted(groups + in_stream + given_back) == list(range(drawn["group_index"])), "a prompt was lost"


def test_requests_in_flight_survive_weight_updates(toy, miles, tmp_path):
    run = tmp_path / "run"
    long = ["--rollout-max-response-len", "400", "--max-tokens-per-gpu", "2048", "--num-rollout", "4"]
    miles(*command(toy, run, *CONTINUOUS, *long, "--async-max-concurrent-samples", "32")[1:])
    rows = [json.loads(line) for path in (run / "rollouts").glob("rollout_*.jsonl") for line in path.open()]
    mixed = [row for row in rows if len(set(row["token_weight_versions"])) > 1]
    assert mixed, "no response was under way while the weights changed"
    for row in mixed:
        assert row["token_weight_versions"] == sorted(row["token_weight_versions"])
        assert len(row["token_weight_versions"]) == row["response_length"] == len(row["rollout_log_probs"])
    assert all("rollout/resumed_samples" not in event for event in rollout_events(run))


@pytest.mark.parametrize("rollouts", [[], ["--rollout-function-path", "fully_async", "--max-weight-staleness", "2"]])
def test_asynchronous_training_learns(toy, miles, tmp_path, rollouts):
    run = tmp_path / "run"
    easy = ["--custom-rm-path", "easy_reward.digits", "--num-rollout", "30", "--save-interval", "100"]
    easy += ["--eval-interval", "100", "--rollout-batch-size", "8", "--n-samples-per-prompt", "8"]
    miles(*command(toy, run, *easy, *rollouts)[1:], PYTHONPATH=str(Path(__file__).parent))
    rewards = [event["rollout/raw_reward"] for event in rollout_events(run)]
    assert statistics.fmean(rewards[-5:]) > statistics.fmean(rewards[:5]) + 0.2


def test_old_log_probabilities_are_those_of_the_weights_that_generated(toy, miles, tmp_path):
    run = tmp_path / "run"
    flags = ("--train-backend", "megatron", "--keep-old-actor", "--num-rollout", "3")
    miles("train-async", *toy.flags(run, *flags))
    steps = [line["metrics"] for line in map(json.loads, (run / "metrics.jsonl").open()) if line["kind"] == "train"]
    assert len(steps) == 6
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-4 for step in steps)
    # The third rollout was made by the weights before the second one trained them.
    assert abs(steps[4]["train/ppo_kl"]) > 1e-5
