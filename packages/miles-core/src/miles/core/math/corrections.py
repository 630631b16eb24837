"""Importance weights that correct for the engine sampling from another distribution than the trainer computes.

T = response tokens, packed.  ``log_ratio`` = trainer's minus engine's log-probability of each sampled token, 0 on
masked ones. Weights are constants of the loss: they carry no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from miles.core.math.ratio import importance_ratio


class ImportanceWeights(NamedTuple):
    """Weights per token, the ratios they were made from, and 1 where the two differ."""

    weight_T: torch.Tensor
    ratio_T: torch.Tensor
    changed_T: torch.Tensor


def truncated_weights(log_ratio_T: torch.Tensor, *, low: float, high: float) -> ImportanceWeights:
    """Ratios kept within ``[low, high]`` (TIS, https://fengyao.notion.site/off-policy-rl)."""
    ratio_T = importance_ratio(log_ratio_T.detach())
    weight_T = ratio_T.clamp(low, high)
    return ImportanceWeights(weight_T, ratio_T, (weight_T != ratio_T).to(ratio_T.dtype))


def icepop_weights(log_ratio_T: torch.Tensor, *, low: float, high: float) -> ImportanceWeights:
    """Ratios within ``[low, high]``, and 0 outside (IcePop, arXiv:2510.18855)."""
    ratio_T = importance_ratio(log_ratio_T.detach())
    outside_T = (ratio_T < low) | (ratio_T > high)
    return ImportanceWeights(ratio_T.masked_fill(outside_T, 0.0), ratio_T, outside_T.to(ratio_T.dtype))
