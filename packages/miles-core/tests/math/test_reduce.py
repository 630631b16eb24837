import torch

from miles.core.math.ragged import Ragged
from miles.core.math.reduce import (
    sample_mean_weights,
    step_denominator,
    token_sum_weights,
    weighted_sum,
    weighted_sums,
)

X = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
MASK = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
LAYOUT = Ragged([2, 3])


def test_reductions_worked_by_hand():
    weights_T = sample_mean_weights(MASK, LAYOUT.sum(MASK), LAYOUT)
    assert weighted_sum(X, weights_T) == 5.5
    assert weighted_sum(X, token_sum_weights(MASK)) == 11.0


def test_a_sample_without_trainable_tokens_contributes_nothing():
    mask_T = torch.zeros(5)
    assert weighted_sum(X, sample_mean_weights(mask_T, LAYOUT.sum(mask_T), LAYOUT)) == 0.0


def test_parts_of_a_sample_add_up_when_they_share_its_denominator():
    whole = weighted_sum(X, sample_mean_weights(MASK, LAYOUT.sum(MASK), LAYOUT))
    count_S = LAYOUT.sum(MASK)
    parts = 0.0
    for tokens, lengths in (([0, 2, 3], [1, 2]), ([1, 4], [1, 1])):
        weights_T = sample_mean_weights(MASK[tokens], count_S, Ragged(lengths))
        parts += weighted_sum(X[tokens], weights_T)
    assert parts == whole


def test_several_values_are_reduced_at_once():
    sums = weighted_sums({"x": X, "twice": 2 * X}, token_sum_weights(MASK))
    assert {name: value.item() for name, value in sums.items()} == {"x": 11.0, "twice": 22.0}
    assert weighted_sums({}, MASK) == {}


def test_denominators_count_a_masked_sample_once():
    assert step_denominator([3.0, 0.0, 2.0], per_token=True) == 6.0
    assert step_denominator([3.0, 0.0, 2.0], per_token=False) == 3.0
