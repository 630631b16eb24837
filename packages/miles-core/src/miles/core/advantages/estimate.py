"""What an advantage estimator is given, and what it returns.

S = samples, A = their response tokens, packed; both of the whole rollout, or of one rank's share of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from miles.core.math.ragged import Ragged


@dataclass(frozen=True)
class AdvantageInputs:
    """Rewards and log-probabilities of whole samples.  A column that the estimator does not need may be None."""

    layout: Ragged
    mask_A: torch.Tensor
    """1.0 = trains, 0.0 = does not."""
    reward_S: torch.Tensor
    """After group normalization, where the estimator wants it."""
    old_logp_A: torch.Tensor | None = None
    """Under the policy before the first optimizer step on this rollout."""
    rollout_logp_A: torch.Tensor | None = None
    """Under the engine."""
    ref_logp_A: torch.Tensor | None = None
    teacher_logp_A: torch.Tensor | None = None
    value_A: torch.Tensor | None = None
    """The critic's, before the first optimizer step on this rollout."""
    kl_A: torch.Tensor | None = None
    """KL from the reference model at each token, 0 on masked ones; None: no penalty."""

    @cached_property
    def masked_A(self) -> torch.Tensor:
        """True where a token does not train."""
        return self.mask_A == 0


@dataclass(frozen=True, slots=True)
class AdvantageOptions:
    """Numbers that estimators share."""

    gamma: float = 1.0
    """Discount per token."""
    lambd: float = 1.0
    """Decay of the generalized advantage estimate."""
    kl_coef: float = 0.0
    """Weight of the penalty ``kl_A`` in the reward."""


@dataclass(frozen=True, slots=True)
class Advantages:
    """Of each token; constants of the loss."""

    advantage_A: torch.Tensor
    return_A: torch.Tensor


class AdvantageEstimator(Protocol):
    """``miles.advantages`` entry points."""

    def __call__(self, inputs: AdvantageInputs, options: AdvantageOptions) -> Advantages: ...


def required(column: torch.Tensor | None, name: str, estimator: str) -> torch.Tensor:
    """``column``, or ValueError when the estimator was not given it."""
    if column is None:
        raise ValueError(f"{estimator} advantages need {name}, and this rollout has none")
    return column
