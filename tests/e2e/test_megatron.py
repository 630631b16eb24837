"""The main job with Megatron-Core as the trainer: ranks that share every layer, under Ray; and PPO in one process."""

import json

import pytest
from safetensors.torch import load_file

from miles.core.run_directory import RunDirectory

pytestmark = pytest.mark.e2e


def test_divided_layers_train_what_the_engine_samples(toy, miles, tmp_path):
    run = RunDirectory(tmp_path / "run")
    flags = ("--train-backend", "megatron", "--actor-num-gpus-per-node", "2", "--tensor-model-parallel-size", "2")
    miles(
        "train",
        *toy.flags(run.path, *flags, "--sequence-parallel", "--save-hf", str(tmp_path / "export")),
        *("--num-rollout", "2", "--save-interval", "2"),
    )
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["metrics"] for line in lines if line["kind"] == "train"]
    assert len(steps) == 4
    # Engine and trainer hold the same weights, before every rollout.
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-4 for step in (steps[0], steps[2]))
    before, after = load_file(toy.checkpoint / "model.safetensors"), load_file(tmp_path / "export/model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before if "norm" not in name)
    assert (run.path / "latest_checkpointed_iteration.txt").read_text().strip() == "1"


def test_ppo_trains_actor_and_critic_in_one_process(toy, miles, tmp_path):
    run = RunDirectory(tmp_path / "run")
    ppo = ("--train-backend", "megatron", "--advantage-estimator", "ppo", "--critic-lr", "2e-2")
    short = ("--save-interval", "4", "--eval-interval", "1000", "--skip-eval-before-train")
    miles("train", *toy.flags(run.path, *ppo, "--num-critic-only-steps", "1", *short))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["metrics"] for line in lines if line["kind"] == "train"]
    assert len(steps) == 8
    assert steps[-1]["train/critic-value_loss"] < steps[0]["train/critic-value_loss"]
    assert not any("train/loss" in step for step in steps[:2])
    assert all("train/loss" in step for step in steps[2:])
    assert (run.path / "iter_0000003" / "critic" / "state.json").is_file()
