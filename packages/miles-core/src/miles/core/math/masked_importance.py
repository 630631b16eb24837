"""Masked importance sampling: weights and rejection at the level of tokens or of sequences.

T = response tokens, packed; S = samples.  ``log_ratio`` = trainer's minus engine's log-probability of each sampled
token, 0 on masked ones.  Nothing here carries a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from miles.core.math.ragged import Ragged
from miles.core.math.ratio import SampleSum, importance_ratio, whole_sample

Level = Literal["token", "sequence", "geometric"]
"""What a ratio belongs to: a token, a sequence (its tokens' product), or a sequence by their geometric mean."""
Mode = Literal["truncate", "clip", "mask"]
"""What happens to a weight out of bounds: cut to the upper bound, cut to both, or its tokens leave the loss."""


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How importance weights are bounded."""

    mode: Mode = "truncate"
    level: Level = "token"
    lower: float = 0.5
    upper: float = 2.0


@dataclass(frozen=True, slots=True)
class RejectionRule:
    """Which tokens leave the loss: those whose ratio at ``level`` is out of bounds.

    A sequence leaves whole when one of its tokens is less likely under the trainer than under the engine by a factor
    below ``veto_threshold``.
    """

    level: Level = "token"
    lower: float = 0.5
    upper: float = 2.0
    veto_threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that ratios belong to.

    ``mask_sum_S`` counts whole samples; ``add`` sums over context-parallel ranks.
    """

    layout: Ragged
    mask_T: torch.Tensor
    mask_sum_S: torch.Tensor
    add: SampleSum = whole_sample

    def total(self, x_T: torch.Tensor) -> torch.Tensor:
        """Sum over each sample's trainable tokens: [S]."""
        return self.add(self.layout.sum(x_T * self.mask_T))


class Bounded(NamedTuple):
    """Ratios before and weights after the bounds, the tokens that stay (0 or 1), and where the bounds were crossed."""

    ratio_T: torch.Tensor
    weight_T: torch.Tensor
    mask_T: torch.Tensor
    below_T: torch.Tensor
    above_T: torch.Tensor


def ratio_at(level: Level, log_ratio_T: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Importance ratio of each token, or of its sequence: [T]."""
    log_ratio_T = log_ratio_T.detach()
    if level == "token":
        return importance_ratio(log_ratio_T)
    total_S = tokens.total(log_ratio_T)
    if level == "geometric":
        total_S = total_S / tokens.mask_sum_S.clamp(min=1.0)
    return tokens.layout.spread(importance_ratio(total_S))


def bounded_weights(log_ratio_T: torch.Tensor, rule: WeightRule, tokens: Tokens) -> Bounded:
    """Importance weights under ``rule``, before normalization."""
    ratio_T = ratio_at(rule.level, log_ratio_T, tokens)
    below_T, above_T = ratio_T < rule.lower, ratio_T > rule.upper
    weight_T, mask_T = ratio_T, tokens.mask_T
    if rule.mode == "truncate":
        weight_T, below_T = ratio_T.clamp(max=rule.upper), torch.zeros_like(below_T)
    elif rule.mode == "clip":
        weight_T = ratio_T.clamp(rule.lower, rule.upper)
    else:
        mask_T = mask_T.masked_fill(below_T | above_T, 0.0)
    return Bounded(ratio_T, weight_T, mask_T, below_T.to(ratio_T.dtype), above_T.to(ratio_T.dtype))


class Rejection(NamedTuple):
    """Tokens that stay (0 or 1), those out of bounds, those below the veto threshold, and those of vetoed sequences."""

    mask_T: torch.Tensor
    below_T: torch.Tensor
    above_T: torch.Tensor
    catastrophic_T: torch.Tensor
    vetoed_T: torch.Tensor


def rejected(log_ratio_T: torch.Tensor, rule: RejectionRule, tokens: Tokens) -> Rejection:
    """Apply ``rule`` to the tokens that are still in the loss."""
    ratio_T = ratio_at(rule.level, log_ratio_T, tokens)
    below_T, above_T = ratio_T < rule.lower, ratio_T > rule.upper
    mask_T = tokens.mask_T.masked_fill(below_T | above_T, 0.0)
    catastrophic_T = vetoed_T = torch.zeros_like(ratio_T)
    if rule.veto_threshold is not None:
        catastrophic_T = (log_ratio_T.detach() < math.log(rule.veto_threshold)).to(ratio_T.dtype) * tokens.mask_T
        vetoed_T = tokens.layout.spread((tokens.total(catastrophic_T) > 0).to(ratio_T.dtype))
        mask_T = mask_T * (1.0 - vetoed_T)
    return Rejection(mask_T, below_T.to(ratio_T.dtype), above_T.to(ratio_T.dtype), catastrophic_T, vetoed_T)


def weight_totals(weight_T: torch.Tensor, level: Level, kept: Tokens) -> torch.Tensor:
    """``[sum of weights, number of weights]`` of this rank's tokens, fp64.

    Added up over micro-batches and ranks, the first over the second is the mean weight of the optimizer step, whatever
    the packing.  One weight per token that stays, or per sequence of which a token stays.
    """
    share_T = kept.mask_T.double()
    if level != "token":
        share_T = share_T / kept.layout.spread(kept.total(kept.mask_T).clamp(min=1.0))
    return torch.stack((weight_T.double() @ share_T, share_T.sum()))
