"""KL divergence, estimated from the log-probabilities of sampled tokens (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from miles.core.math.ratio import MAX_LOG_RATIO

KlKind = Literal["k1", "k2", "k3", "low_var_kl"]
KL_KINDS: tuple[KlKind, ...] = get_args(KlKind)

_LOW_VAR_LIMIT = 10.0
"""``low_var_kl`` is k3 clamped to this size."""


def approx_kl(log_ratio_T: torch.Tensor, kind: KlKind, importance_ratio_T: torch.Tensor | None = None) -> torch.Tensor:
    """KL(policy || base) at each token that the policy sampled, estimated from ``d = log_ratio = logp - base_logp``.

    ``k1``: d, ``k2``: d^2 / 2, ``k3``: exp(-d) - 1 + d, ``low_var_kl``: k3 clamped to [-10, 10].  As a loss, only k2
    and k3 have a gradient that moves the policy to the base; the expected gradient of k1 is 0.

    ``importance_ratio`` = new / sampling policy corrects for tokens that an older policy sampled; its gradient is part
    of the estimate's (unbiased KL, arXiv:2512.02556).  It multiplies before the clamp.
    """
    d_T = log_ratio_T
    if kind == "k1":
        kl_T = d_T
    elif kind == "k2":
        kl_T = d_T.square() * 0.5
    elif kind == "k3":
        kl_T = torch.expm1(-d_T) + d_T
    elif kind == "low_var_kl":
        bounded_T = d_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl_T = torch.expm1(-bounded_T) + bounded_T
    else:
        raise ValueError(f"unknown KL estimate {kind!r}; expected one of {', '.join(KL_KINDS)}")
    if importance_ratio_T is not None:
        kl_T = importance_ratio_T * kl_T
    return kl_T.clamp(-_LOW_VAR_LIMIT, _LOW_VAR_LIMIT) if kind == "low_var_kl" else kl_T
