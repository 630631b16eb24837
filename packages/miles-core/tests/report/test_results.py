import json

import pytest

from miles.core.report.results import evaluations
from miles.core.run_directory import RunDirectory


def write(path, *rewards):
    rows = [{"reward": reward, "response_length": 10 + index} for index, reward in enumerate(rewards)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_response_passes_with_the_full_reward_only(tmp_path):
    run = RunDirectory(tmp_path).create()
    write(run.eval_samples(0, "sums"), 1.0, 0.8, 0.0, None)
    (evaluation,) = evaluations(run)
    assert evaluation.pass_rate == 0.25
    assert evaluation.mean_reward == pytest.approx(0.45)
    assert evaluation.mean_length == 11.5


def test_reward_mappings_are_read_by_the_configured_key(tmp_path):
    run = RunDirectory(tmp_path).create()
    run.write_config({"reward_key": "score", "eval_reward_key": None}, {})
    write(run.eval_samples(0, "sums"), {"score": 1.0, "acc": 0.0}, {"score": 0.0, "acc": 1.0})
    assert evaluations(run)[0].pass_rate == 0.5


def test_evaluations_come_in_order(run):
    found = evaluations(run)
    assert [evaluation.rollout_id for evaluation in found] == [0, 20, 40]
    assert found[0].pass_rate < found[-1].pass_rate
