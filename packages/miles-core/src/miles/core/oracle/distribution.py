"""Softmax distributions over a vocabulary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def log_softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """``z_v / t - log sum_u exp(z_u / t)`` of each row."""
    scaled = logits / temperature
    largest = scaled.max(axis=-1, keepdims=True)
    normalizer: Floats = largest + np.log(np.exp(scaled - largest).sum(axis=-1, keepdims=True))
    return scaled - normalizer


def token_logprobs(logits: Floats, targets: Ints, temperature: float = 1.0) -> Floats:
    """Log-probability of each row's target."""
    return np.array([row[target] for row, target in zip(log_softmax(logits, temperature), targets)])


def entropy(logits: Floats, temperature: float = 1.0) -> Floats:
    """``-sum_v p_v log p_v`` of each row, in nats."""
    logp = log_softmax(logits, temperature)
    total: Floats = -(np.exp(logp) * logp).sum(axis=-1)
    return total
