"""Corrections for the mismatch between trainer and engine.  ``d`` = trainer's minus engine's log-probability.

Arguments are one sample's, an entry per response token.
"""

from __future__ import annotations

import math

import numpy as np

from miles.core.oracle.distribution import Floats
from miles.core.oracle.policy import ratio


def truncated(d: Floats, low: float, high: float) -> Floats:
    """TIS."""
    return np.clip(ratio(d), low, high)


def icepop(d: Floats, low: float, high: float) -> Floats:
    """IcePop."""
    return np.array([r if low <= r <= high else 0.0 for r in ratio(d)])


def ratio_at(level: str, d: Floats, mask: Floats) -> Floats:
    """Ratio of each token, or of its sequence (product or geometric mean over trainable tokens)."""
    if level == "token":
        return ratio(d)
    total = float((d * mask).sum())
    if level == "geometric":
        total /= max(mask.sum(), 1)
    return np.full(len(d), ratio(np.array([total]))[0])


def bounded(mode: str, ratios: Floats, mask: Floats, lower: float, upper: float) -> tuple[Floats, Floats]:
    """Weights under masked importance sampling, and the tokens that stay."""
    if mode == "truncate":
        return np.minimum(ratios, upper), mask
    if mode == "clip":
        return np.clip(ratios, lower, upper), mask
    return ratios, mask * ((ratios >= lower) & (ratios <= upper))


def rejected(d: Floats, ratios: Floats, mask: Floats, lower: float, upper: float, veto: float | None) -> Floats:
    """The tokens that stay under rejection."""
    if veto is not None and any(x < math.log(veto) and m for x, m in zip(d, mask)):
        return np.zeros_like(mask)
    return mask * ((ratios >= lower) & (ratios <= upper))


def mean_weight(weights: list[Floats], masks: list[Floats], level: str) -> float:
    """Mean over the tokens that stay, or over the sequences of which one stays; 1 when nothing does."""
    if level == "token":
        values = [w for weight, mask in zip(weights, masks) for w, m in zip(weight, mask) if m]
    else:
        values = [weight[0] for weight, mask in zip(weights, masks) if mask.any()]
    return float(np.mean(values)) if values else 1.0
