"""The whole policy objective of a micro-batch, a sample at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from miles.core.oracle import corrections, policy
from miles.core.oracle.distribution import Floats


@dataclass(frozen=True, slots=True)
class OracleSample:
    """One sample's response tokens."""

    mask: Floats
    logp: Floats
    entropy: Floats
    old_logp: Floats
    ref_logp: Floats
    rollout_logp: Floats
    advantage: Floats


def policy_objective(samples: list[OracleSample], flags: Any) -> tuple[float, dict[str, float]]:
    """Loss and metrics, as sums over samples of means over tokens, or as sums over tokens.

    ``flags`` has the attributes of ``ObjectiveSpec``.
    """
    loss = 0.0
    sums: dict[str, float] = {}
    for sample in samples:
        terms = _policy_terms(sample, flags)
        terms["entropy_loss"] = sample.entropy if flags.entropy_coef else np.zeros_like(sample.logp)
        total = terms["pg_loss"] - flags.entropy_coef * terms["entropy_loss"]
        if flags.use_kl_loss:
            old = sample.rollout_logp if flags.use_rollout_logprobs else sample.old_logp
            ratio = policy.ratio(sample.logp - old) if flags.use_unbiased_kl else None
            terms["kl_loss"] = policy.kl(sample.logp, sample.ref_logp, flags.kl_loss_type, ratio)
            total = total + flags.kl_loss_coef * terms["kl_loss"]
        loss += reduced(total, sample.mask, flags.calculate_per_token_loss)
        for name, values in terms.items():
            sums[name] = sums.get(name, 0.0) + reduced(values, sample.mask, flags.calculate_per_token_loss)
    return loss, sums


def reduced(values: Floats, mask: Floats, per_token: bool) -> float:
    """Sum over trainable tokens, or their mean; 0 without any."""
    total = float((values * mask).sum())
    return total if per_token else total / max(float(mask.sum()), 1.0)


def _policy_terms(sample: OracleSample, flags: Any) -> dict[str, Floats]:
    old = sample.rollout_logp if flags.use_rollout_logprobs else sample.old_logp
    mean_log_ratio = policy.mean_log_ratio(sample.logp, old, sample.mask)
    log_ratio = sample.logp - old
    if flags.advantage_estimator == "gspo":
        log_ratio = np.full(len(sample.logp), mean_log_ratio)
    clip_high = flags.eps_clip if flags.eps_clip_high is None else flags.eps_clip_high
    pg, clipped = policy.surrogate(
        log_ratio, sample.advantage, clip_low=flags.eps_clip, clip_high=clip_high, dual_clip=flags.eps_clip_c
    )
    ratio = policy.ratio(log_ratio)
    ess = policy.effective_sample_ratio(ratio, sample.mask)
    terms = {"pg_clipfrac": clipped, "ppo_kl": -log_ratio, "ess_ratio": np.full(len(ratio), ess)}
    if flags.use_opsm:
        pg = pg * policy.stays_on_policy(mean_log_ratio, sample.advantage, flags.opsm_delta)
    if flags.use_tis:
        weight = corrections.icepop if flags.custom_tis_function_path == "icepop" else corrections.truncated
        mismatch = sample.old_logp - sample.rollout_logp
        pg = pg * weight(mismatch, flags.tis_clip_low, flags.tis_clip)
        terms["tis"] = policy.ratio(mismatch)
    return terms | {"pg_loss": pg}
