"""Ratios between two policies.

T = response tokens, packed; S = samples.  ``log_ratio`` is always log-probability under the numerator minus that under
the denominator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from miles.core.math.ragged import Ragged

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this distance from 0, so that exp() stays finite: e^20 is 5e8."""

SampleSum = Callable[[torch.Tensor], torch.Tensor]
"""Adds a per-sample tensor over context-parallel ranks, differentiably; the identity where samples are whole."""


def whole_sample(x_S: torch.Tensor) -> torch.Tensor:
    """The ``SampleSum`` of ranks that hold whole samples."""
    return x_S


def masked_log_ratio(logp_T: torch.Tensor, base_logp_T: torch.Tensor, masked_T: torch.Tensor) -> torch.Tensor:
    """``logp - base_logp``, and 0 on masked tokens.

    Masked tokens are neutral from here on, in value and in gradient: whatever log-probability a tool's output has, it
    cannot overflow an exponential and poison a sum that multiplies it by 0.  A NaN on a trainable token is kept: it is
    a mistake to be seen, not to be trained over.
    """
    return (logp_T - base_logp_T).masked_fill(masked_T, 0.0)


def importance_ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    """``exp(log_ratio)`` with the exponent clamped to ``MAX_LOG_RATIO``."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_log_ratio(
    log_ratio_T: torch.Tensor,
    mask_T: torch.Tensor,
    mask_sum_S: torch.Tensor,
    layout: Ragged,
    add: SampleSum = whole_sample,
) -> torch.Tensor:
    """Mean log-ratio over each sample's trainable tokens (GSPO, arXiv:2507.18071): [S], 0 for a sample without any."""
    return add(layout.sum(log_ratio_T * mask_T)) / mask_sum_S.clamp(min=1.0)


def effective_sample_ratio(
    ratio_T: torch.Tensor, mask_T: torch.Tensor, mask_sum_S: torch.Tensor, layout: Ragged, add: SampleSum = whole_sample
) -> torch.Tensor:
    """Effective sample size over sample size of each sample's importance weights: [S], 1 when they are all equal.

    ``(sum w)^2 / (n sum w^2)`` over trainable tokens; 0 for a sample without any.
    """
    w_T = ratio_T * mask_T
    sums_S2 = add(layout.sum(torch.stack((w_T, w_T * w_T), dim=1)))
    return sums_S2[:, 0].square() / (mask_sum_S * sums_S2[:, 1]).clamp(min=1e-30)
