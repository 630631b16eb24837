"""Whitening: advantages with mean 0 and variance 1 over all trainable tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

_EPSILON = 1e-8
"""Added to the variance, as everywhere in the field."""


def whiten(
    advantage_A: torch.Tensor, mask_A: torch.Tensor, all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """``(x - mean) / sqrt(variance + 1e-8)`` at every position, masked ones too; statistics over trainable tokens.

    ``all_reduce`` adds a tensor over all ranks that hold other tokens, data and context parallel alike, and every rank
    takes part, also one without tokens; None: this rank holds all.  The variance is the unbiased one, unless there is
    one token. Statistics are in fp64.  Raises ValueError when no token trains.
    """
    x_A, mask64_A = advantage_A.double(), (mask_A != 0).double()
    sums = torch.stack((mask64_A.sum(), x_A @ mask64_A, x_A.square() @ mask64_A))
    count, total, squares = (sums if all_reduce is None else all_reduce(sums)).unbind()
    if float(count) == 0.0:
        raise ValueError("advantages cannot be whitened: no token of this rollout trains (all loss masks are 0)")
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0.0) * count / (count - 1.0).clamp(min=1.0)
    return ((x_A - mean) * (variance + _EPSILON).rsqrt()).to(advantage_A.dtype)
