"""Kill -9 at any moment and start again with the same command: the run ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MILES
from killing import exported_weights, killed_run, last_checkpoint, metrics, samples

pytestmark = pytest.mark.e2e


def command(toy, run: Path) -> list[str]:
    flags = toy.flags(run, "--save-hf", str(run / "hf" / "{rollout_id}"))
    return [MILES, "train", *flags]


@pytest.fixture(scope="module")
def uninterrupted(toy, miles, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    miles(*command(toy, run)[1:])
    return run


MOMENTS = {
    "generating the third rollout": lambda run: last_checkpoint(run) == "1",
    "training on the third rollout": lambda run: (run / "rollouts" / "rollout_0000002.jsonl").exists(),
    "writing the third checkpoint": lambda run: any(run.glob(".iter_0000002.*.partial")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_continues_bit_for_bit(toy, miles, tmp_path, uninterrupted, moment):
    run = killed_run(lambda run: command(toy, run), tmp_path, MOMENTS[moment], checkpoint="1")
    miles(*command(toy, run)[1:])
    assert metrics(run) == metrics(uninterrupted)
    assert samples(run) == samples(uninterrupted)
    expected, found = exported_weights(uninterrupted), exported_weights(run)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)


def test_finished_run_started_again_only_evaluates_again(toy, miles, uninterrupted):
    before = metrics(uninterrupted), samples(uninterrupted)
    miles(*command(toy, uninterrupted)[1:])
    assert (metrics(uninterrupted), samples(uninterrupted)) == before
