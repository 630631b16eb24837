import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.math.masked_importance import (
    RejectionRule,
    Tokens,
    WeightRule,
    bounded_weights,
    ratio_at,
    rejected,
    weight_totals,
)
from miles.core.math.ragged import Ragged
from miles.core.oracle import corrections

LEVELS = st.sampled_from(["token", "sequence", "geometric"])
MODES = st.sampled_from(["truncate", "clip", "mask"])


@st.composite
def samples(draw):
    """Log-ratios, 0 on masked tokens, and masks of a few samples."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    masks = [(generator.random(length) < 0.75).astype(float) for length in lengths]
    return [generator.normal(0, 1.2, len(mask)) * mask for mask in masks], masks


def packed(arrays):
    return torch.tensor(np.concatenate(arrays))


def tokens_of(masks):
    layout, mask_T = Ragged([len(mask) for mask in masks]), packed(masks)
    return Tokens(layout, mask_T, layout.sum(mask_T))


def test_levels_worked_by_hand():
    d = torch.tensor([2.0, 0.5, 8.0]).log()
    mask = torch.tensor([1.0, 1.0, 0.0])
    layout = Ragged([3])
    tokens = Tokens(layout, mask, layout.sum(mask))
    torch.testing.assert_close(ratio_at("token", d, tokens), torch.tensor([2.0, 0.5, 8.0]))
    torch.testing.assert_close(ratio_at("sequence", d, tokens), torch.ones(3))
    d = torch.tensor([2.0, 8.0, 1.0]).log()
    torch.testing.assert_close(ratio_at("sequence", d, tokens), torch.full((3,), 16.0))
    torch.testing.assert_close(ratio_at("geometric", d, tokens), torch.full((3,), 4.0))


@settings(deadline=None)
@given(samples(), LEVELS, MODES)
def test_weights_equal_the_oracle(case, level, mode):
    log_ratios, masks = case
    found = bounded_weights(packed(log_ratios), WeightRule(mode, level, 0.4, 1.9), tokens_of(masks))
    expected = [
        corrections.bounded(mode, corrections.ratio_at(level, d, mask), mask, 0.4, 1.9)
        for d, mask in zip(log_ratios, masks, strict=True)
    ]
    np.testing.assert_allclose(found.weight_T.numpy(), np.concatenate([weight for weight, _ in expected]), rtol=1e-9)
    np.testing.assert_array_equal(found.mask_T.numpy(), np.concatenate([mask for _, mask in expected]))


@settings(deadline=None)
@given(samples(), LEVELS, st.none() | st.just(0.2))
def test_rejection_equals_the_oracle(case, level, veto):
    log_ratios, masks = case
    rule = RejectionRule(level, 0.4, 1.9, veto)
    found = rejected(packed(log_ratios), rule, tokens_of(masks))
    expected = [
        corrections.rejected(d, corrections.ratio_at(level, d, mask), mask, 0.4, 1.9, veto)
        for d, mask in zip(log_ratios, masks, strict=True)
    ]
    np.testing.assert_array_equal(found.mask_T.numpy(), np.concatenate(expected))


@settings(deadline=None)
@given(samples(), LEVELS)
def test_mean_weight_equals_the_oracle_and_does_not_depend_on_the_packing(case, level):
    log_ratios, masks = case
    weights = [corrections.ratio_at(level, d, mask) for d, mask in zip(log_ratios, masks, strict=True)]
    whole = weight_totals(packed(weights), level, tokens_of(masks))
    parts = sum(
        weight_totals(torch.tensor(weight), level, tokens_of([mask]))
        for weight, mask in zip(weights, masks, strict=True)
    )
    torch.testing.assert_close(parts, whole)
    total, count = whole.tolist()
    mean = total / count if count else 1.0
    np.testing.assert_allclose(mean, corrections.mean_weight(weights, masks, level), rtol=1e-9)


def test_one_catastrophic_token_rejects_its_whole_sequence():
    d = torch.tensor([0.0, math.log(1e-5), 0.0])
    layout, mask = Ragged([2, 1]), torch.ones(3)
    rule = RejectionRule("token", lower=1e-9, upper=10.0, veto_threshold=1e-4)
    result = rejected(d, rule, Tokens(layout, mask, layout.sum(mask)))
    assert result.mask_T.tolist() == [0.0, 0.0, 1.0]
    assert result.catastrophic_T.tolist() == [0.0, 1.0, 0.0]
    assert result.vetoed_T.tolist() == [1.0, 1.0, 0.0]
