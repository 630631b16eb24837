"""A model that was taught to use a tool, and practises with it in every way: turns, agents, councils."""

from __future__ import annotations

import json
import statistics

import pytest
import scales
from conftest import RECIPES
from stage import CPU_TRAINER

from miles.core.run_directory import RunDirectory

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SFT_STEPS, STEPS = 20, 6
"""Enough to call the tool sometimes, and to call it more often afterwards."""


def run(miles, directory, num_rollout, flags):
    """A finished ``miles train`` with the recipes' functions."""
    miles(*scales.Stage(directory, num_rollout, flags).command()[1:], PYTHONPATH=str(RECIPES))
    return RunDirectory(directory)


@pytest.fixture
def practise(miles, taught):
    """Train the taught model with the tool, changed flags and some left out, in the folder ``name``."""
    folder, data = taught
    practice = CPU_TRAINER | scales.practice_flags(folder / "taught", data, seed=0)

    def practise(name, num_rollout=STEPS, without=(), **changes):
        flags = {name: value for name, value in practice.items() if not name.startswith(("eval", *without))}
        flags |= {name.replace("_", "-"): value for name, value in changes.items()}
        return run(miles, folder / name, num_rollout, flags)

    return practise


def metrics(run_directory, kind, name):
    lines = [json.loads(line) for line in (run_directory.path / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"][name] for line in lines if line["kind"] == kind and name in line["metrics"]]


def samples(run_directory, rollout_id):
    return [json.loads(line) for line in run_directory.rollout_samples(rollout_id).read_text().splitlines()]


@pytest.fixture(scope="module")
def taught(miles, tmp_path_factory):
    """Folder of a model that was shown the tool, and the task's data."""
    folder = tmp_path_factory.mktemp("scales")
    model, data = scales.prepare(folder, seed=0)
    stage = scales.teaching_stage(folder, model, data, seed=0, num_rollout=SFT_STEPS)
    run(miles, stage.directory, SFT_STEPS, stage.flags)
    return folder, data


def test_a_model_learns_to_use_its_tool(practise, miles):
    practice = practise("turns", save_interval=3)
    used = metrics(practice, "rollout", "rollout/tools/used_ratio")
    rewards = metrics(practice, "rollout", "rollout/raw_reward")
    assert used[0] > 0
    assert statistics.fmean(used[-2:]) > statistics.fmean(used[:2])
    assert statistics.fmean(rewards[-2:]) >= statistics.fmean(rewards[:2])
    assert max(metrics(practice, "train", "train/train_rollout_logprob_abs_diff")) < 1e-4
    for sample in samples(practice, 0):
        assert len(sample["loss_mask"]) == len(sample["rollout_log_probs"]) == sample["response_length"]
        turns = sample["metadata"]["turns"]
        assert sum(sample["loss_mask"]) == sum(end - start for start, end in turns)
    # The weights of version 3 are in a checkpoint, which the backend exports.
    done = miles("diagnose", str(practice.path), check=False)
    assert done.stdout.startswith("rollout 3: "), done.stdout + done.stderr
    assert (done.returncode, "verdict: they agree" in done.stdout) == (0, True)


def test_an_agent_talks_to_a_session_and_trains_on_what_was_sampled(practise):
    agent = {"custom_generate_function_path": "agentic", "custom_agent_function_path": "scales_agent.run"}
    without = ("generate-max", "generate-tool-specs", "generate-execute", "rollout-skip-special-tokens")
    practice = practise("agent", num_rollout=2, without=without, **agent)
    assert metrics(practice, "rollout", "rollout/agent/weighings")[0] > 0
    assert metrics(practice, "rollout", "rollout/agent/failed_ratio") == [0, 0]
    # What the trainer computes for the recorded ids is what the engine computed when it sampled them.
    assert max(metrics(practice, "train", "train/train_rollout_logprob_abs_diff")) < 1e-4
    weighed = [sample for sample in samples(practice, 0) if sample["metadata"]["round_number"] > 1]
    assert weighed
    assert all(0 in sample["loss_mask"] for sample in weighed)


def test_a_council_of_agents_trains_every_member(practise):
    council = {
        "custom_generate_function_path": "scales_council.generate",
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 4,
        "use_dynamic_global_batch_size": True,
    }
    without = ("generate-", "global-batch", "custom-rm")
    practice = practise("council", num_rollout=1, without=without, rm_type="deterministic_random", **council)
    made = samples(practice, 0)
    assert len(made) == 4 * 4 * 4
    assert {sample["metadata"]["agent"] for sample in made} == {0, 1, 2, 3}
    assert all(sample["rollout_id"] == sample["index"] for sample in made)
    assert max(metrics(practice, "train", "train/train_rollout_logprob_abs_diff")) < 1e-4
