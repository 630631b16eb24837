"""Reduction of per-token values: the denominators come from the caller.

A reduction is a dot product with weights that are made once per micro-batch.  Because the weights hold full-sample
denominators, the sum over micro-batches, and over data and context parallel ranks, does not depend on how the samples
were distributed.  The loss of an optimizer step is that sum divided by ``step_denominator``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from miles.core.math.ragged import Ragged


def sample_mean_weights(mask_T: torch.Tensor, denominator_S: torch.Tensor, layout: Ragged) -> torch.Tensor:
    """Weights whose dot product is the sum over samples of the masked mean over that sample's tokens.

    ``denominator_S`` counts a whole sample's trainable tokens, also where this rank holds a part of them.  A sample
    without any contributes 0.
    """
    return mask_T / layout.spread(denominator_S.clamp(min=1.0))


def token_sum_weights(mask_T: torch.Tensor) -> torch.Tensor:
    """Weights whose dot product is the sum over trainable tokens."""
    return mask_T


def weighted_sum(x_T: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """Reduce per-token values to a scalar; 0 for no tokens, and differentiable even then."""
    return torch.dot(x_T, weights_T)


def weighted_sums(rows: Mapping[str, torch.Tensor], weights_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """``weighted_sum`` of every row; the results are detached."""
    if not rows:
        return {}
    with torch.no_grad():
        sums = torch.stack(list(rows.values())) @ weights_T
    return dict(zip(rows, sums.unbind()))


def step_denominator(mask_sums: Sequence[float], *, per_token: bool) -> float:
    """What the summed loss of an optimizer step is divided by: its samples, or its trainable tokens.

    ``mask_sums`` are trainable tokens of each sample of the step, over all ranks.  A sample without any still counts 1.
    """
    if per_token:
        return float(sum(max(count, 1.0) for count in mask_sums))
    return float(len(mask_sums))
