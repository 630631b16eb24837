"""Rewards of tokens: the KL penalty at each, the sample's reward at its last trainable one.

S = samples, A = response tokens, packed.
"""

from __future__ import annotations

import torch

from miles.core.advantages.estimate import AdvantageInputs
from miles.core.math.ragged import Ragged


def last_trainable(mask_A: torch.Tensor, layout: Ragged) -> torch.Tensor:
    """1.0 at the last trainable token of each sample, 0.0 elsewhere; a sample without any has none."""
    kept_A = mask_A != 0
    count_up_to_A = kept_A.long().cumsum(0)
    count_up_to_end_S = layout.sum(kept_A.to(mask_A.dtype)).long().cumsum(0)
    return (kept_A & (count_up_to_A == layout.spread(count_up_to_end_S))).to(mask_A.dtype)


def kl_penalty(inputs: AdvantageInputs, kl_coef: float) -> torch.Tensor:
    """``kl_coef * kl`` of each token; 0 without a penalty."""
    if inputs.kl_A is None or kl_coef == 0.0:
        return torch.zeros_like(inputs.mask_A)
    return kl_coef * inputs.kl_A


def shaped_rewards(inputs: AdvantageInputs, kl_coef: float) -> torch.Tensor:
    """Reward of each token.  A sample without trainable tokens drops its reward: nothing that it could teach trains."""
    terminal_A = last_trainable(inputs.mask_A, inputs.layout) * inputs.layout.spread(inputs.reward_S)
    return terminal_A - kl_penalty(inputs, kl_coef)


def discounted_suffix_sums(
    x_A: torch.Tensor, sample_of_token_A: torch.Tensor, discount: float, *, longest: int
) -> torch.Tensor:
    """``y_t = x_t + discount * y_{t+1}`` within each sample; none has more than ``longest`` tokens.

    By doubling: after round ``i`` each token holds the sum over its next ``2^i`` tokens, so that a sample of n tokens
    takes log2(n) rounds over the packed tensor, and rounding errors grow with log2(n) as well.
    """
    y_A, reach = x_A, 1
    while reach < min(longest, len(x_A)):
        same = sample_of_token_A[reach:] == sample_of_token_A[:-reach]
        y_A = torch.cat((y_A[:-reach] + discount**reach * (y_A[reach:] * same), y_A[-reach:]))
        reach *= 2
    return y_A
