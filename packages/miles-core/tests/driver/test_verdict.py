import json

import pytest

from miles.core.config import Config
from miles.core.driver.verdict import verify_metric
from miles.core.errors import TrainingError
from miles.core.flags.hooks import Hooks


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "eval", "metrics": {"eval/sums": value}} for value in (0.1, 0.8, 0.6)]
    rows.append({"kind": "train", "metrics": {"eval/sums": 2.0}})
    path.write_text("".join(json.dumps({"step": 0, "rollout_id": 0, "time": 0.0} | row) + "\n" for row in rows))
    return path


def verify(metrics, key, threshold):
    verify_metric(metrics, Config.of(ci_metric_checker_key=key, ci_metric_checker_threshold=threshold)[Hooks])


def test_one_evaluation_that_reaches_the_threshold_is_enough(metrics):
    verify(metrics, "eval/sums", 0.8)


def test_a_run_that_never_reaches_it_fails(metrics):
    with pytest.raises(TrainingError, match=r"the best of 3 evaluations is 0\.8, less than .* 0\.9"):
        verify(metrics, "eval/sums", 0.9)


def test_an_unknown_metric_is_answered_with_those_there_are(metrics):
    with pytest.raises(TrainingError, match="there are eval/sums"):
        verify(metrics, "eval/products", 0.5)


def test_without_a_key_nothing_is_verified(tmp_path):
    verify(tmp_path / "missing", None, None)
