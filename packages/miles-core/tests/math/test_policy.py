import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.math.policy import clipped_surrogate, off_policy_sequence_mask
from miles.core.math.ragged import Ragged
from miles.core.math.ratio import (
    effective_sample_ratio,
    importance_ratio,
    masked_log_ratio,
    sequence_log_ratio,
)
from miles.core.oracle import policy


def test_losses_worked_by_hand():
    log_ratio_T = -torch.tensor([0.0, -0.3, 0.3, -0.3, 0.3, -3.0])
    advantage_T = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    result = clipped_surrogate(log_ratio_T, advantage_T, clip_low=0.2, clip_high=0.28)
    expected = torch.tensor([-1.0, -1.28, -0.740818, 1.349859, 0.8, 20.085537])
    torch.testing.assert_close(result.loss_T, expected, rtol=1e-5, atol=1e-6)
    assert result.clipped_T.tolist() == [0, 1, 0, 0, 1, 0]
    dual = clipped_surrogate(log_ratio_T, advantage_T, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    assert dual.loss_T[-1] == 3.0
    torch.testing.assert_close(dual.loss_T[:-1], result.loss_T[:-1])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-60, 60), st.floats(-5, 5)), min_size=1, max_size=20),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.none() | st.floats(1.1, 5),
)
def test_losses_equal_the_oracle(tokens, low, high, dual):
    log_ratio, advantage = np.array(tokens).T
    options = {"clip_low": low, "clip_high": high, "dual_clip": dual}
    found = clipped_surrogate(torch.tensor(log_ratio), torch.tensor(advantage), **options)
    loss, clipped = policy.surrogate(log_ratio, advantage, **options)
    np.testing.assert_allclose(found.loss_T.numpy(), loss, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.clipped_T.numpy(), clipped)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gradient_at_ratio_one_is_minus_the_advantage(dual_clip):
    advantage_T = torch.tensor([1.5, -0.7, 0.0])
    logp_T = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    result = clipped_surrogate(logp_T - logp_T.detach(), advantage_T, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip)
    result.loss_T.sum().backward()
    torch.testing.assert_close(logp_T.grad, -advantage_T)


def test_clipped_tokens_have_no_gradient():
    log_ratio_T = torch.tensor([0.5, -0.5, 2.0], requires_grad=True)
    advantage_T = torch.tensor([1.0, -1.0, -1.0])
    clipped_surrogate(log_ratio_T, advantage_T, clip_low=0.2, clip_high=0.2, dual_clip=3.0).loss_T.sum().backward()
    assert log_ratio_T.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_dual_clip_must_exceed_one():
    with pytest.raises(ValueError, match=r"1\.0; it must exceed 1"):
        clipped_surrogate(torch.zeros(1), torch.ones(1), clip_low=0.2, clip_high=0.2, dual_clip=1.0)


def test_sequence_ratio_worked_by_hand():
    layout = Ragged([3, 2])
    new = torch.tensor([-1.0, -1.0, -1.0, -2.0, -2.0])
    old = torch.tensor([-1.1, -0.9, -1.3, -1.0, -1.5])
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    log_ratio_S = sequence_log_ratio(new - old, mask, layout.sum(mask), layout)
    torch.testing.assert_close(-layout.spread(log_ratio_S), torch.tensor([0, 0, 0, 0.75, 0.75]), atol=1e-6, rtol=0)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    keep_T = off_policy_sequence_mask(log_ratio_S, advantage, layout, delta=0.5)
    assert keep_T.tolist() == [1, 1, 1, 0, 0]


def test_a_sample_without_trainable_tokens_has_neutral_ratios():
    layout, mask = Ragged([2, 0]), torch.zeros(2)
    count_S = layout.sum(mask)
    assert sequence_log_ratio(torch.ones(2), mask, count_S, layout).tolist() == [0.0, 0.0]
    assert effective_sample_ratio(torch.ones(2), mask, count_S, layout).tolist() == [0.0, 0.0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-25, 25), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12))
def test_effective_sample_ratio_equals_the_oracle(tokens):
    log_ratio, mask = np.array(tokens).T
    weights = policy.ratio(log_ratio)
    layout = Ragged([len(mask)])
    mask_T = torch.tensor(mask)
    found = effective_sample_ratio(torch.tensor(weights), mask_T, layout.sum(mask_T), layout)
    np.testing.assert_allclose(found.item(), policy.effective_sample_ratio(weights, mask), rtol=1e-9)


def test_effective_sample_ratio_is_one_for_equal_weights():
    layout, mask = Ragged([4]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert effective_sample_ratio(torch.full((4,), 3.0), mask, layout.sum(mask), layout).tolist() == [1.0]


def test_masked_tokens_are_neutral_in_value_and_gradient():
    logp_T = torch.tensor([-1.0, -1e30, float("nan")], requires_grad=True)
    log_ratio_T = masked_log_ratio(logp_T, torch.zeros(3), torch.tensor([False, True, True]))
    importance_ratio(log_ratio_T).sum().backward()
    assert log_ratio_T.tolist() == [-1.0, 0.0, 0.0]
    assert logp_T.grad[1:].tolist() == [0.0, 0.0]


def test_nan_on_a_trainable_token_is_not_hidden():
    log_ratio_T = masked_log_ratio(torch.tensor([float("nan")]), torch.zeros(1), torch.tensor([False]))
    assert importance_ratio(log_ratio_T).isnan().all()


def test_ratios_stay_finite():
    ratio = importance_ratio(torch.tensor([-1e9, 1e9]))
    torch.testing.assert_close(ratio, torch.tensor([-20.0, 20.0]).exp())
