import pytest
import torch

from miles.core.training.loss_batch import LossOutput
from miles.core.training.metric_sums import MetricSums


def output(**sums):
    tokens = {name: torch.tensor(value) for name, value in sums.items() if name != "per_sample"}
    return LossOutput(torch.zeros(()), tokens, {"per_sample": torch.tensor(sums["per_sample"])})


def test_sums_are_divided_once():
    sums = MetricSums()
    sums.add(output(loss=3.0, per_sample=1.0))
    sums.add(output(loss=5.0, per_sample=2.0))
    assert sums.means(denominator=4.0, num_samples=3) == {"loss": 2.0, "per_sample": 1.0}


def test_ranks_take_part_in_one_collective():
    sums, calls = MetricSums(), []
    sums.add(output(loss=3.0, per_sample=1.0))

    def all_reduce(values):
        calls.append(values.shape)
        return values * 2

    means = sums.means(denominator=6.0, num_samples=2, all_reduce=all_reduce)
    assert means == {"loss": 1.0, "per_sample": 1.0}
    assert calls == [(2,)]


def test_many_small_terms_keep_their_precision():
    sums = MetricSums()
    sums.add(output(loss=1e8, per_sample=0.0))
    for _ in range(100):
        sums.add(output(loss=1.0, per_sample=0.0))
    assert sums.means(denominator=1.0, num_samples=1)["loss"] == pytest.approx(1e8 + 100, abs=1e-6)


def test_a_rank_without_output_takes_part_with_zeros():
    sums = MetricSums()
    sums.expect(("loss",), ("kl",), device=torch.device("cpu"))
    assert sums.names == (("loss",), ("kl",))
    assert sums.means(denominator=2.0, num_samples=3) == {"loss": 0.0, "kl": 0.0}
