"""Runs that train an adapter and send nothing else: the engines hold the model and add it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import MILES
from killing import exported_weights, killed_run, last_checkpoint, metrics, samples
from safetensors.torch import load_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

FIRST_SAMPLE_OF_ROLLOUT_1 = 16


def command(toy, run: Path, *flags: str) -> list[str]:
    lora = ("--lora-rank", "4", "--lora-serving", "adapter", "--save-hf", str(run / "hf" / "{rollout_id}"))
    harming = ("--use-fault-tolerance", "--custom-generate-function-path", "lethal_generate.generate")
    return ["train", *toy.flags(run, *lora, *harming, *flags)]


def harm(sample: int) -> dict[str, str]:
    """Environment of a run whose engine is killed while ``sample`` is generated; -1: it is not."""
    return {"PYTHONPATH": str(Path(__file__).parent), "LETHAL_SIGNAL": "SIGKILL", "LETHAL_SAMPLE": str(sample)}


@pytest.fixture(scope="module")
def train(toy, miles):
    def run(directory: Path, *flags: str, sample: int = -1) -> Path:
        miles(*command(toy, directory, *flags), **harm(sample))
        return directory

    return run


def of_rollouts(run: Path) -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").open())
    return [event["metrics"] for event in found if event["kind"] == "rollout"]


def assert_same_run(run: Path, other: Path) -> None:
    """But for how many engines were lost, the shares of time, and the prompts that their caches still held."""
    for one, another in zip(metrics(run), metrics(other), strict=True):
        assert one["kind"] == another["kind"]
        if one["kind"] != "rollout":
            assert one == another
    assert samples(run) == samples(other)
    expected, found = exported_weights(other), exported_weights(run)
    assert all((expected[name] == found[name]).all() for name in expected)


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("whole") / "run")


def test_an_update_is_the_adapter_and_the_engine_computes_what_the_trainer_does(undisturbed):
    adapter = load_file(undisturbed / "hf" / "3" / "adapter" / "adapter_model.safetensors")
    size = sum(tensor.nbytes for tensor in adapter.values())
    whole = sum(tensor.nbytes for tensor in exported_weights(undisturbed).values())
    assert [each["perf/update_weights_wire_bytes"] for each in of_rollouts(undisturbed)] == [size] * 4
    assert size < whole / 5
    assert of_rollouts(undisturbed)[0]["perf/weight_probe_abs_diff"] < 1e-5
    steps = [event["metrics"] for event in metrics(undisturbed) if event["kind"] == "train"]
    assert len(steps) == 8
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-5 for step in steps[::2])


def test_a_killed_run_continues_bit_for_bit(toy, train, tmp_path, undisturbed, monkeypatch):
    for name, value in harm(-1).items():
        monkeypatch.setenv(name, value, prepend=os.pathsep if name == "PYTHONPATH" else None)
    run = killed_run(
        lambda run: [MILES, *command(toy, run)], tmp_path, lambda run: last_checkpoint(run) == "1", checkpoint="1"
    )
    assert_same_run(train(run), undisturbed)


def test_an_engine_in_place_of_a_lost_one_gets_the_adapter_over_the_model_on_disk(train, tmp_path, undisturbed):
    run = train(tmp_path / "run", "--rollout-num-engines", "2", sample=FIRST_SAMPLE_OF_ROLLOUT_1)
    assert sum(each["rollout/engine_restarts"] for each in of_rollouts(run)) == 1
    assert_same_run(run, undisturbed)
