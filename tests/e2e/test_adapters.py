"""Runs that train an adapter and send nothing else: the engines hold the model and add it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killing import DEADLINE_S, exported_weights, killed_run, last_checkpoint, metrics, samples
from safetensors.torch import load_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

FIRST_SAMPLE_OF_ROLLOUT_1 = 16


@pytest.fixture(scope="module", autouse=True)
def _an_engine_that_can_be_harmed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("LETHAL_SIGNAL", "SIGKILL")
        patch.setenv("LETHAL_SAMPLE", "-1")
        yield


def command(toy, run: Path, *flags: str) -> list[str]:
    lora = ("--lora-rank", "4", "--lora-serving", "adapter", "--save-hf", str(run / "hf" / "{rollout_id}"))
    harming = ("--use-fault-tolerance", "--custom-generate-function-path", "lethal_generate.generate")
    return [str(Path(sys.executable).with_name("miles")), "train", *toy.flags(run, *lora, *harming, *flags)]


def train(toy, run: Path, *flags: str) -> Path:
    done = subprocess.run(command(toy, run, *flags), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
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
def undisturbed(toy, tmp_path_factory) -> Path:
    return train(toy, tmp_path_factory.mktemp("whole") / "run")


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


def test_a_killed_run_continues_bit_for_bit(toy, tmp_path, undisturbed):
    run = killed_run(lambda run: command(toy, run), tmp_path, lambda run: last_checkpoint(run) == "1", checkpoint="1")
    assert_same_run(train(toy, run), undisturbed)


def test_an_engine_in_place_of_a_lost_one_gets_the_adapter_over_the_model_on_disk(
    toy, tmp_path, undisturbed, monkeypatch
):
    monkeypatch.setenv("LETHAL_SAMPLE", str(FIRST_SAMPLE_OF_ROLLOUT_1))
    run = train(toy, tmp_path / "run", "--rollout-num-engines", "2")
    assert sum(each["rollout/engine_restarts"] for each in of_rollouts(run)) == 1
    assert_same_run(run, undisturbed)
