"""Generalized advantage estimation (arXiv:1506.02438), for PPO."""

from __future__ import annotations

import torch

from miles.core.advantages.estimate import AdvantageInputs, AdvantageOptions, Advantages, required
from miles.core.advantages.shaping import discounted_suffix_sums, shaped_rewards


def ppo(inputs: AdvantageInputs, options: AdvantageOptions) -> Advantages:
    """Advantages over the trainable tokens of each sample, as if the others were not there.

    With K = trainable tokens of one sample: ``delta_k = r_k + gamma V_{k+1} - V_k`` with ``V_K = 0``,
    ``A_k = delta_k + gamma lambda A_{k+1}`` and ``return_k = A_k + V_k``.  Masked tokens get 0.
    A truncated sample is bootstrapped with 0, like a finished one.
    """
    value_A = required(inputs.value_A, "the critic's values", "ppo")
    kept = (~inputs.masked_A).nonzero().squeeze(1)
    sample_K, value_K = inputs.layout.sample_of_token_T[kept], value_A[kept]
    delta_K = shaped_rewards(inputs, options.kl_coef)[kept] - value_K
    delta_K[:-1] += options.gamma * value_K[1:] * (sample_K[1:] == sample_K[:-1])
    advantage_K = discounted_suffix_sums(
        delta_K, sample_K, options.gamma * options.lambd, longest=max(inputs.layout.lengths, default=0)
    )
    zero_A = torch.zeros_like(value_A)
    return Advantages(
        zero_A.index_copy(0, kept, advantage_K),
        zero_A.index_copy(0, kept, advantage_K + value_K),
    )
