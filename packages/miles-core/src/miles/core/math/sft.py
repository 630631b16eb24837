"""Loss of supervised fine-tuning."""

from __future__ import annotations

import torch


def negative_log_likelihood(logp_T: torch.Tensor, masked_T: torch.Tensor) -> torch.Tensor:
    """``-logp`` of each token, 0 on masked ones."""
    return -logp_T.masked_fill(masked_T, 0.0)
