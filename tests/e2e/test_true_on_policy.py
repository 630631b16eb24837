"""``--true-on-policy-mode``: trainer and engine give the same log-probabilities, to the bit, at every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


def events(run: Path, kind: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [event["metrics"] for event in found if event["kind"] == kind]


def flags(toy, run: Path, *extra: str) -> list[str]:
    return toy.flags(run, "--num-rollout", "3", "--eval-interval", "1000", "--skip-eval-before-train", *extra)


DIFFERENCE = "train/train_rollout_logprob_abs_diff"


def test_trainer_and_engine_differ_by_exactly_nothing(toy, miles, tmp_path):
    miles("train", *flags(toy, tmp_path / "exact", "--true-on-policy-mode", "--rollout-temperature", "0.8"))
    miles("train", *flags(toy, tmp_path / "plain", "--rollout-temperature", "0.8"))
    exact, plain = (events(tmp_path / name, "train") for name in ("exact", "plain"))
    assert [step[DIFFERENCE] for step in exact] == [0.0] * 6
    assert all(0.0 < step[DIFFERENCE] < 1e-4 for step in plain)
    assert all(step["train/ppo_kl"] == 0.0 for step in exact[::2])
    for one, other in zip(exact, plain, strict=True):
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-2)


def test_an_engine_that_cannot_compute_in_the_trainer_is_refused(toy, miles, tmp_path):
    done = miles(
        *("train", *flags(toy, tmp_path / "run", "--true-on-policy-mode", "--rollout-engine", "sglang")), check=False
    )
    assert done.returncode != 0
    assert "cannot compute inside the trainer" in done.stdout + done.stderr


@pytest.mark.slow
def test_nor_do_they_on_several_ranks_with_adapters(toy, miles, tmp_path):
    ranks = ("--actor-num-gpus-per-node", "2", "--lora-rank", "4")
    miles("train", *flags(toy, tmp_path / "run", "--true-on-policy-mode", "--num-rollout", "2", *ranks))
    assert [step[DIFFERENCE] for step in events(tmp_path / "run", "train")] == [0.0] * 4
