"""Terms of the policy loss.  Every argument is one sample's, an entry per response token."""

from __future__ import annotations

import numpy as np

from miles.core.oracle.distribution import Floats


def kl(logp: Floats, base_logp: Floats, kind: str, importance_ratio: Floats | None = None) -> Floats:
    """Estimate of KL(policy || base) at each token."""
    d = logp - base_logp

    bounded = np.clip(d, -20, 20)
    value: Floats = {
        "k1": d,
        "k2": d**2 / 2,
        "k3": np.exp(-d) - 1 + d,
        "low_var_kl": np.exp(-bounded) - 1 + bounded,
    }[kind]
    if importance_ratio is not None:
        value = importance_ratio * value
    return np.clip(value, -10, 10) if kind == "low_var_kl" else value


def ratio(log_ratio: Floats) -> Floats:
    """``exp`` of a log-ratio that is held within 20 of 0."""
    return np.exp(np.clip(log_ratio, -20, 20))


def mean_log_ratio(logp: Floats, old_logp: Floats, mask: Floats) -> float:
    """Mean of ``logp - old_logp`` over trainable tokens; 0 without any."""
    trained = [new - old for new, old, m in zip(logp, old_logp, mask) if m]
    return float(np.sum(trained) / max(len(trained), 1))


def surrogate(
    log_ratio: Floats, advantage: Floats, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Floats, Floats]:
    """Clipped policy loss of each token, and 1 where the clip decided."""
    losses, clipped = [], []
    for r, a in zip(ratio(log_ratio), advantage):
        plain, bounded = -r * a, -min(max(r, 1 - clip_low), 1 + clip_high) * a
        loss = max(plain, bounded)
        if dual_clip is not None and a < 0:
            loss = min(loss, -dual_clip * a)
        losses.append(loss)
        clipped.append(float(bounded > plain))
    return np.array(losses), np.array(clipped)


def stays_on_policy(mean_log_ratio: float, advantage: Floats, delta: float) -> Floats:
    """1 for tokens that off-policy sequence masking keeps."""
    return np.array([0.0 if a < 0 and -mean_log_ratio > delta else 1.0 for a in advantage])


def effective_sample_ratio(weights: Floats, mask: Floats) -> float:
    """``(sum w)^2 / (n sum w^2)`` over trainable tokens; 0 without any."""
    trained = np.array([w for w, m in zip(weights, mask) if m])
    return float(trained.sum() ** 2 / (len(trained) * (trained**2).sum())) if len(trained) else 0.0


def value_loss(value: Floats, old_value: Floats, target: Floats, clip: float) -> tuple[Floats, Floats]:
    """Clipped squared error of each token, and 1 where the value moved further than ``clip``."""
    bounded = old_value + np.clip(value - old_value, -clip, clip)
    loss: Floats = np.maximum((bounded - target) ** 2, (value - target) ** 2)
    return loss, (np.abs(value - old_value) > clip).astype(np.float64)
