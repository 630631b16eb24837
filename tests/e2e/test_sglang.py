"""The main job with the real SGLang server as its engine."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest
from sglang_environment import python_with_sglang
from test_main_job import events

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

NUM_ROLLOUTS, NUM_SAMPLES = 16, 32
LEARN = (
    *("--custom-rm-path", "easy_reward.digits", "--num-rollout", str(NUM_ROLLOUTS), "--n-samples-per-prompt", "8"),
    *("--eval-interval", "8", "--save-interval", "100"),
)
MODULES = {"PYTHONPATH": str(Path(__file__).parent)}


@pytest.fixture(scope="module")
def sglang_python() -> str:
    return python_with_sglang()


@dataclass(frozen=True)
class Finished:
    """A run and what it said."""

    path: Path
    output: str
    num_restarts: int


@pytest.fixture(scope="module", params=["shm", "broadcast"])
def finished(request, toy, miles, sglang_python, tmp_path_factory) -> Finished:
    """A finished GRPO run that is long enough to learn.

    In the first one weights go through memory that both map, and everything is compared; the server releases its memory
    while the trainer works, and draws by seeds.  In the second one changes of weights go over a process group (gloo),
    the server draws as it likes, and is killed in the midst of the second rollout.
    """
    path = tmp_path_factory.mktemp(request.param) / "run"
    flags = ("--update-weight-transport", request.param, "--update-weight-buffer-size", "65536")
    variables = dict(MODULES)
    if request.param == "shm":
        flags += ("--offload", "--check-weight-update-equal", "--update-weight-probe-interval", "1")
    else:
        flags += ("--update-weight-delta", "--sglang-enable-deterministic-inference", "false", "--use-fault-tolerance")
        flags += ("--custom-generate-function-path", "lethal_generate.generate")
        variables |= {"LETHAL_SIGNAL": "SIGKILL", "LETHAL_SAMPLE": str(NUM_SAMPLES)}
    sglang = ("--rollout-engine", "sglang", "--sglang-python", sglang_python, "--sglang-max-total-tokens", "16k")
    done = miles("train", *toy.flags(path, *LEARN, *sglang, *flags), **variables)
    return Finished(path, done.stdout + done.stderr, int(request.param == "broadcast"))


def test_engine_and_trainer_agree_on_the_log_probs_of_every_step(finished):
    train = events(finished.path, "train")
    assert len(train) == 2 * NUM_ROLLOUTS
    for event in train[::2]:  # the second step of a rollout is off-policy
        assert event["metrics"]["train/train_rollout_logprob_abs_diff"] < 1e-4
        assert abs(event["metrics"]["train/ppo_kl"]) < 1e-6


def test_every_sample_is_there_once_and_made_by_the_weights_of_its_version(finished):
    for rollout_id in range(NUM_ROLLOUTS):
        rows = [json.loads(line) for line in (finished.path / "rollouts" / f"rollout_{rollout_id:07d}.jsonl").open()]
        assert [row["index"] for row in rows] == list(range(NUM_SAMPLES * rollout_id, NUM_SAMPLES * (rollout_id + 1)))
        assert {version for row in rows for version in row["weight_versions"]} == {str(rollout_id)}


def rewards(run: Path) -> list[float]:
    return [event["metrics"]["rollout/raw_reward"] for event in events(run, "rollout")]


@pytest.fixture(scope="module")
def embedded(toy, miles, tmp_path_factory) -> Path:
    """The same run on the embedded engine."""
    path = tmp_path_factory.mktemp("embedded") / "run"
    miles("train", *toy.flags(path, *LEARN), **MODULES)
    return path


def test_it_learns_as_on_the_embedded_engine(finished, embedded):
    ours, theirs = rewards(finished.path), rewards(embedded)
    for curve in (
        ours,
        theirs,
    ):  # over ten seeds it rises by 0.54 +- 0.12; means deviate by 0.05
        assert statistics.fmean(curve[-4:]) > statistics.fmean(curve[:4]) + 0.05
    assert abs(statistics.fmean(ours) - statistics.fmean(theirs)) < 0.25


def test_a_killed_server_was_replaced(finished):
    restarts = [event["metrics"].get("rollout/engine_restarts", 0) for event in events(finished.path, "rollout")]
    assert sum(restarts) == finished.num_restarts
    assert ("engine 0 has ended with status -9 (SIGKILL)" in finished.output) == bool(finished.num_restarts)


def test_evaluations_are_there_and_the_server_told_its_story(finished):
    assert [event["step"] for event in events(finished.path, "eval")] == [0, 8, 16]
    assert (finished.path / "logs" / "engine-0.log").stat().st_size > 0


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
