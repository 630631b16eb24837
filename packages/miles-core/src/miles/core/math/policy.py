"""Policy-gradient losses of each token.

T = response tokens, packed; S = samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from miles.core.math.ragged import Ragged
from miles.core.math.ratio import importance_ratio


class TokenLoss(NamedTuple):
    """A loss per token, and 1 where clipping chose it."""

    loss_T: torch.Tensor
    clipped_T: torch.Tensor


def clipped_surrogate(
    log_ratio_T: torch.Tensor,
    advantage_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """Clipped policy loss (arXiv:1707.06347): the larger of ``-ratio A`` and ``-clamp(ratio, 1 - low, 1 + high) A``.

    ``log_ratio`` = new minus old log-probability, of the token or (GSPO) of its sequence.  ``dual_clip`` caps the loss
    of tokens with a negative advantage at ``-dual_clip A`` (arXiv:1912.09729) and must exceed 1; such tokens do not
    count as clipped.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"the dual clip is {dual_clip}; it must exceed 1")
    ratio_T = importance_ratio(log_ratio_T)
    plain_T = -ratio_T * advantage_T
    bounded_T = -ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage_T
    loss_T = torch.maximum(plain_T, bounded_T)
    clipped_T = (bounded_T > plain_T).to(loss_T.dtype)
    if dual_clip is not None:
        cap_T = -dual_clip * advantage_T
        loss_T = torch.where(advantage_T < 0, torch.minimum(loss_T, cap_T), loss_T)
    return TokenLoss(loss_T, clipped_T)


def off_policy_sequence_mask(
    log_ratio_S: torch.Tensor, advantage_T: torch.Tensor, layout: Ragged, *, delta: float
) -> torch.Tensor:
    """1 for tokens to keep, 0 where the advantage is negative and the sequence has left its old policy (OPSM).

    ``log_ratio_S`` is the mean new minus old log-probability of each sequence; it has left when its negative exceeds
    ``delta``.
    """
    left_T = layout.spread(-log_ratio_S.detach() > delta)
    return (~(left_T & (advantage_T < 0))).to(advantage_T.dtype)
