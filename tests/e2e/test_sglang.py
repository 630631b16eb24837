"""The main job with the real SGLang server as its engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sglang_environment import python_with_sglang
from test_main_job import events

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def sglang_python() -> str:
    return python_with_sglang()


@pytest.fixture(scope="module", params=["shm", "broadcast"])
def finished(request, toy, miles, sglang_python, tmp_path_factory) -> Path:
    """A finished GRPO run; weights go through memory that both map, or over a process group (gloo).

    Engines release their memory while the trainer works, and draw by seeds, in the first run and not in the second.
    """
    run = tmp_path_factory.mktemp(request.param) / "run"
    how = ("--update-weight-transport", request.param, "--update-weight-buffer-size", "65536")
    how += ("--offload",) if request.param == "shm" else ("--sglang-enable-deterministic-inference", "false")
    sglang = ("--rollout-engine", "sglang", "--sglang-python", sglang_python, "--sglang-max-total-tokens", "16k")
    miles("train", *toy.flags(run, *sglang, *how))
    return run


def test_engine_and_trainer_agree_on_the_log_probs_of_every_step(finished):
    train = events(finished, "train")
    assert len(train) == 8
    for event in train[::2]:  # the second step of a rollout is off-policy
        assert event["metrics"]["train/train_rollout_logprob_abs_diff"] < 1e-4
        assert abs(event["metrics"]["train/ppo_kl"]) < 1e-6


def test_every_response_was_made_by_the_weights_of_its_version(finished):
    for rollout_id in range(4):
        rows = [json.loads(line) for line in (finished / "rollouts" / f"rollout_{rollout_id:07d}.jsonl").open()]
        assert len(rows) == 16
        assert {version for row in rows for version in row["weight_versions"]} == {str(rollout_id)}


def test_evaluations_are_there_and_the_server_told_its_story(finished):
    assert [event["step"] for event in events(finished, "eval")] == [0, 2, 4]
    assert (finished / "logs" / "engine-0.log").stat().st_size > 0


def test_megatron_trains_what_sglang_samples(toy, miles, sglang_python, tmp_path):
    run = tmp_path / "run"
    sglang = ("--rollout-engine", "sglang", "--sglang-python", sglang_python, "--sglang-max-total-tokens", "16k")
    megatron = ("--train-backend", "megatron", "--actor-num-gpus-per-node", "2", "--tensor-model-parallel-size", "2")
    short = ("--num-rollout", "2", "--eval-interval", "1000", "--skip-eval-before-train")
    miles("train", *toy.flags(run, *sglang, *megatron, "--sequence-parallel", *short))
    train = events(run, "train")
    assert len(train) == 4
    for event in train[::2]:  # the second step of a rollout is off-policy
        assert event["metrics"]["train/train_rollout_logprob_abs_diff"] < 1e-4


def test_a_misspelt_argument_of_the_server_is_answered_before_anything_starts(toy, miles, sglang_python, tmp_path):
    run = tmp_path / "run"
    done = miles(
        "train",
        *toy.flags(run, "--sglang-python", sglang_python, "--sglang-max-runing-requests", "4", "--sglang-tp-size", "2"),
        check=False,
    )
    assert done.returncode == 2
    assert "--sglang-max-running-requests" in done.stderr
    assert "--sglang-tp-size is set by Miles: give --rollout-num-gpus-per-engine" in done.stderr
    assert "Traceback" not in done.stderr
    assert not run.exists()
