"""REINFORCE++ (arXiv:2501.03262) and its variant with a group baseline."""

from __future__ import annotations

from miles.core.advantages.estimate import AdvantageInputs, AdvantageOptions, Advantages
from miles.core.advantages.shaping import discounted_suffix_sums, kl_penalty, shaped_rewards


def reinforce_plus_plus(inputs: AdvantageInputs, options: AdvantageOptions) -> Advantages:
    """Discounted return of each token: the KL penalties from there on, and the sample's raw reward.

    The reward stands at the last trainable token.  A sample without any is allowed.
    """
    layout = inputs.layout
    reward_A = shaped_rewards(inputs, options.kl_coef)
    return_A = discounted_suffix_sums(
        reward_A, layout.sample_of_token_T, options.gamma, longest=max(layout.lengths, default=0)
    )
    return Advantages(return_A, return_A)


def reinforce_plus_plus_baseline(inputs: AdvantageInputs, options: AdvantageOptions) -> Advantages:
    """The sample's reward less its group's mean, less the KL penalty of the token."""
    advantage_A = inputs.layout.spread(inputs.reward_S) - kl_penalty(inputs, options.kl_coef)
    return Advantages(advantage_A, advantage_A)
