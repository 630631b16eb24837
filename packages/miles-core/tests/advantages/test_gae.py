import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.advantages.estimate import AdvantageInputs, AdvantageOptions
from miles.core.advantages.gae import ppo
from miles.core.math.ragged import Ragged
from miles.core.oracle import advantages


@pytest.mark.parametrize(
    ("gamma", "lambd", "expected", "returns"),
    [
        (1.0, 1.0, [0.5, 0.6, 0.7, 0.8], [1.0, 1.0, 1.0, 1.0]),
        (0.9, 0.95, [0.161148, 0.35222, 0.564, 0.8], [0.661148, 0.75222, 0.864, 1.0]),
        (1.0, 0.0, [-0.1, -0.1, -0.1, 0.8], [0.4, 0.3, 0.2, 1.0]),
    ],
)
def test_advantages_worked_by_hand(gamma, lambd, expected, returns):
    inputs = AdvantageInputs(
        Ragged([4]), torch.ones(4), reward_S=torch.tensor([1.0]), value_A=torch.tensor([0.5, 0.4, 0.3, 0.2])
    )
    result = ppo(inputs, AdvantageOptions(gamma, lambd))
    torch.testing.assert_close(result.advantage_A, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.return_A, torch.tensor(returns), rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.integers(0, 2**32),
)
def test_packed_advantages_equal_the_oracle(lengths, gamma, lambd, seed):
    draw = np.random.default_rng(seed)
    masks = [(draw.random(length) < 0.7).astype(float) for length in lengths]
    kls, values = ([draw.normal(size=length) for length in lengths] for _ in range(2))
    rewards = draw.normal(size=len(lengths))
    inputs = AdvantageInputs(
        Ragged(lengths),
        torch.tensor(np.concatenate(masks)),
        torch.tensor(rewards),
        kl_A=torch.tensor(np.concatenate(kls)),
        value_A=torch.tensor(np.concatenate(values)),
    )
    found = ppo(inputs, AdvantageOptions(gamma, lambd, kl_coef=0.1))
    expected = [
        advantages.gae(advantages.token_rewards(reward, kl, mask, 0.1), value, mask, gamma, lambd)
        for reward, kl, mask, value in zip(rewards, kls, masks, values, strict=True)
    ]
    np.testing.assert_allclose(found.advantage_A, np.concatenate([a for a, _ in expected]), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.return_A, np.concatenate([r for _, r in expected]), rtol=1e-9, atol=1e-9)


def test_long_samples_keep_fp32_precision():
    length, weight = 3000, 0.999 * 0.95
    values = np.random.default_rng(0).normal(size=length)
    inputs = AdvantageInputs(
        Ragged([length]), torch.ones(length), torch.tensor([1.0]), value_A=torch.tensor(values, dtype=torch.float32)
    )
    found = ppo(inputs, AdvantageOptions(0.999, 0.95)).advantage_A
    rewards = advantages.token_rewards(1.0, np.zeros(length), np.ones(length), 0.0)
    expected, _ = advantages.gae(rewards, values, np.ones(length), 0.999, weight / 0.999)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_values_are_required():
    with pytest.raises(ValueError, match="critic's values"):
        ppo(AdvantageInputs(Ragged([1]), torch.ones(1), torch.ones(1)), AdvantageOptions())
