import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.advantages.estimate import AdvantageInputs, AdvantageOptions
from miles.core.advantages.reinforce import reinforce_plus_plus, reinforce_plus_plus_baseline
from miles.core.math.ragged import Ragged
from miles.core.oracle import advantages


def test_returns_worked_by_hand():
    inputs = AdvantageInputs(
        Ragged([3, 4]),
        torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
        torch.tensor([1.0, -1.0]),
        kl_A=torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0]),
    )
    found = reinforce_plus_plus(inputs, AdvantageOptions(gamma=0.9, kl_coef=0.1))
    expected = torch.tensor([0.7577, 0.853, 0.97, -0.9, -1.0, 0.0, 0.0])
    torch.testing.assert_close(found.advantage_A, expected)
    torch.testing.assert_close(found.return_A, expected)


def test_baseline_variant_worked_by_hand():
    inputs = AdvantageInputs(
        Ragged([2, 2]), torch.ones(4), torch.tensor([0.5, -0.5]), kl_A=torch.tensor([0.1, 0.2, 0.0, 0.3])
    )
    found = reinforce_plus_plus_baseline(inputs, AdvantageOptions(kl_coef=0.1))
    torch.testing.assert_close(found.advantage_A, torch.tensor([0.49, 0.48, -0.5, -0.53]))


def test_a_sample_without_trainable_tokens_is_allowed():
    inputs = AdvantageInputs(Ragged([2, 0, 1]), torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert reinforce_plus_plus(inputs, AdvantageOptions()).advantage_A.tolist() == [0.0, 0.0, 3.0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**32))
def test_packed_returns_equal_the_oracle(lengths, gamma, seed):
    draw = np.random.default_rng(seed)
    masks = [(draw.random(length) < 0.7).astype(float) for length in lengths]
    kls = [draw.normal(size=length) for length in lengths]
    rewards = draw.normal(size=len(lengths))
    inputs = AdvantageInputs(
        Ragged(lengths),
        torch.tensor(np.concatenate(masks)),
        torch.tensor(rewards),
        kl_A=torch.tensor(np.concatenate(kls)),
    )
    found = reinforce_plus_plus(inputs, AdvantageOptions(gamma=gamma, kl_coef=0.1))
    expected = [
        advantages.discounted_returns(advantages.token_rewards(reward, kl, mask, 0.1), gamma)
        for reward, kl, mask in zip(rewards, kls, masks, strict=True)
    ]
    np.testing.assert_allclose(found.advantage_A, np.concatenate(expected), rtol=1e-9, atol=1e-9)
