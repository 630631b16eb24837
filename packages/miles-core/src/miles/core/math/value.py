"""Loss of the critic."""

from __future__ import annotations

import torch

from miles.core.math.policy import TokenLoss


def clipped_value_loss(
    value_T: torch.Tensor, old_value_T: torch.Tensor, return_T: torch.Tensor, *, clip: float
) -> TokenLoss:
    """Squared error to the return; the larger of the plain one and that of a value kept within ``clip`` of the old one.

    No factor of one half.  A token counts as clipped when its value moved further than ``clip``.
    """
    moved_T = value_T - old_value_T
    bounded_T = old_value_T + moved_T.clamp(-clip, clip)
    loss_T = torch.maximum((bounded_T - return_T).square(), (value_T - return_T).square())
    return TokenLoss(loss_T, (moved_T.detach().abs() > clip).to(loss_T.dtype))
