"""Distillation from a teacher that the run serves, and its data written, read back and trained on without engines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from miles.core.training.train_data import read_train_data

pytestmark = pytest.mark.e2e


def metrics(run: Path, kind: str) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [event["metrics"] for event in events if event["kind"] == kind]


def flags(toy, run: Path, *extra: str) -> list[str]:
    short = ("--num-rollout", "2", "--eval-interval", "1000", "--skip-eval-before-train")
    return toy.flags(run, *short, "--use-opd", "--opd-kl-coef", "0.5", *extra)


def without_evaluations(words: list[str]) -> list[str]:
    for name, count in (("--eval-prompt-data", 3), ("--eval-interval", 2), ("--eval-interval", 2)):
        begin = words.index(name)
        words = words[:begin] + words[begin + count :]
    return [word for word in words if word != "--skip-eval-before-train"]


@pytest.fixture(scope="module")
def finished(toy, miles, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("distillation") / "run"
    profile = ("--use-pytorch-profiler", "--profile-step-start", "1", "--profile-step-end", "2")
    teacher = ("--opd-teacher-load", str(toy.checkpoint))
    miles("train", *flags(toy, run, *teacher, "--dump-details", str(run / "details"), *profile, "--ci-test"))
    return run


def test_a_teacher_that_is_the_student_teaches_nothing_until_the_student_has_moved(finished):
    first, second = (step["rollout/opd_reverse_kl"] for step in metrics(finished, "rollout"))
    assert abs(first) < 1e-5
    assert abs(second) > 1e-3
    assert (finished / "logs" / "teacher.log").is_file()


def test_the_trainer_holds_the_teacher_as_well(finished, toy, miles, tmp_path):
    run = tmp_path / "run"
    miles("train", *flags(toy, run, "--opd-teacher-load", str(toy.checkpoint), "--opd-type", "megatron"))
    assert not (run / "logs" / "teacher.log").exists()
    for one, other in zip(metrics(run, "rollout"), metrics(finished, "rollout"), strict=True):
        assert one["rollout/opd_reverse_kl"] == pytest.approx(other["rollout/opd_reverse_kl"], rel=1e-2, abs=1e-5)


def test_what_was_trained_on_is_dumped_and_profiled(finished):
    data = read_train_data(finished / "details" / "train_data" / "1_0.safetensors")
    assert len(data.columns["teacher_log_probs"]) == 16
    (trace,) = (finished / "profile").iterdir()
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def test_dumped_samples_are_trained_on_again_without_engines(finished, toy, miles, tmp_path):
    replay = tmp_path / "replay"
    samples = str(finished / "details" / "rollout_data" / "{rollout_id}.jsonl")
    miles("train", *without_evaluations(flags(toy, replay, "--load-debug-rollout-data", samples)))
    assert metrics(replay, "train") == metrics(finished, "train")
    assert not list((replay / "logs").glob("engine*"))
