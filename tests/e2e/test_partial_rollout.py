"""Responses that are cut at the end of a rollout and gone on with in the next: token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

FLAGS = [
    *("--partial-rollout", "--mask-offpolicy-in-partial-rollout", "--over-sampling-batch-size", "12"),
    *("--rollout-max-response-len", "300", "--max-tokens-per-gpu", "4096", "--num-rollout", "5"),
    *("--eval-interval", "100", "--save-interval", "100", "--use-tis"),
    # Weights that hardly change: every log-probability of a continued response must still be the trainer's.
    *("--lr", "1e-12"),
]


@pytest.fixture(scope="module")
def run(toy, miles, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("partial") / "run"
    miles("train", *toy.flags(run, *FLAGS))
    return run


@pytest.fixture(scope="module")
def continued(run) -> list[tuple[int, dict]]:
    """(rollout it was trained in, sample) of every response that was begun in an earlier one."""
    rows = []
    for path in sorted((run / "rollouts").glob("rollout_*.jsonl")):
        number = int(path.stem.partition("_")[2])
        rows += [(number, row) for row in map(json.loads, path.open()) if "start_rollout_id" in row["metadata"]]
    assert rows, "no response was cut"
    return rows


def test_tokens_of_older_weights_are_kept_and_do_not_train(continued):
    for number, row in continued:
        versions, mask = row["token_weight_versions"], row.get("loss_mask") or [1] * row["response_length"]
        assert versions == sorted(versions)
        assert len(versions) == len(mask) == len(row["rollout_log_probs"]) == row["response_length"]
        assert min(versions) >= row["metadata"]["start_rollout_id"]
        assert [trains for version, trains in zip(versions, mask, strict=True) if version < number].count(1) == 0
        assert all(trains for version, trains in zip(versions, mask, strict=True) if version == number)


def test_log_probs_of_continued_responses_belong_to_their_tokens(run):
    events = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    steps = [event["metrics"] for event in events if event["kind"] == "train"]
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-4 for step in steps)


def test_no_prompt_is_trained_on_twice(run):
    groups = []
    for path in (run / "rollouts").glob("rollout_*.jsonl"):
        groups += {json.loads(line)["group_index"] for line in path.open()}
    assert len(groups) == len(set(groups)) == 5 * 4
