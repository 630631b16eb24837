"""Group-relative advantages (GRPO, arXiv:2402.03300; GSPO, arXiv:2507.18071, uses the same)."""

from __future__ import annotations

from miles.core.advantages.estimate import AdvantageInputs, AdvantageOptions, Advantages


def grpo(inputs: AdvantageInputs, options: AdvantageOptions) -> Advantages:
    """Every token gets its sample's group-normalized reward.

    There is no KL penalty in the reward: a ``--kl-coef`` that would have no effect is refused by the configuration,
    where a KL term in the loss (``--use-kl-loss``) is the way.
    """
    advantage_A = inputs.layout.spread(inputs.reward_S)
    return Advantages(advantage_A, advantage_A)
