"""PPO as a user runs it: critic beside actor, in one process and as ranks of its own, killed and continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.e2e


def flags(toy, run: Path, *extra: str) -> list[str]:
    return toy.flags(
        run,
        *("--advantage-estimator", "ppo", "--critic-lr", "2e-2", "--num-critic-only-steps", "1"),
        *("--num-rollout", "3", "--eval-interval", "1000", "--skip-eval-before-train"),
        *("--save-hf", str(run / "hf" / "{rollout_id}"), "--critic-save", str(run / "critic")),
        *extra,
    )


def steps(run: Path) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [event["metrics"] for event in events if event["kind"] == "train"]


@pytest.fixture(scope="module")
def finished(toy, miles, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("ppo") / "run"
    miles("train", *flags(toy, run))
    return run


def test_the_critic_begins_alone_and_its_loss_falls(finished):
    found = steps(finished)
    assert len(found) == 6
    assert not any(name == "train/loss" for step in found[:2] for name in step)
    assert all("train/loss" in step for step in found[2:])
    losses = [step["train/critic-value_loss"] for step in found]
    assert losses[-1] < losses[0]


def test_checkpoints_hold_the_critic_and_its_export_is_a_start_for_others(finished, toy, miles, tmp_path):
    assert (finished / "iter_0000002" / "critic" / "state.json").is_file()
    assert (finished / "critic" / "value_head.safetensors").is_file()
    run = tmp_path / "next"
    miles("train", *flags(toy, run, "--critic-load", str(finished / "critic"), "--num-rollout", "2"))
    assert steps(run)[0]["train/critic-value_loss"] < steps(finished)[0]["train/critic-value_loss"]


@pytest.mark.slow
def test_a_continued_run_is_bit_for_bit_that_of_one_go(finished, toy, miles, tmp_path):
    run = tmp_path / "run"
    miles("train", *flags(toy, run, "--num-rollout", "2"))
    miles("train", *flags(toy, run))
    assert steps(run) == steps(finished)
    for name in ("hf/2/model.safetensors", "critic/model.safetensors", "critic/value_head.safetensors"):
        expected, found = load_file(finished / name), load_file(run / name)
        assert all((expected[key] == found[key]).all() for key in expected), name


@pytest.mark.slow
def test_under_ray_the_critic_has_ranks_of_its_own(finished, toy, miles, tmp_path):
    run = tmp_path / "ray"
    miles("train", *flags(toy, run, "--num-rollout", "2", "--critic-num-gpus-per-node", "2"))
    for found, expected in zip(steps(run), steps(finished), strict=False):
        for name in ("train/critic-value_loss", "train/critic-grad_norm", "train/loss"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
