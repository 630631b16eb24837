"""Corrections of the policy loss for the mismatch between trainer and engine.

T = response tokens of one micro-batch, packed; S = its samples.  ``miles.corrections`` entry points name functions
``(args) -> Correction``; ``args`` has every flag as an attribute.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from miles.core.math.corrections import ImportanceWeights, icepop_weights, truncated_weights
from miles.core.math.masked_importance import (
    Bounded,
    RejectionRule,
    WeightRule,
    bounded_weights,
    rejected,
    weight_totals,
)
from miles.core.math.mismatch import mismatch_statistics
from miles.core.math.ratio import masked_log_ratio
from miles.core.training.loss_batch import LossBatch


@dataclass(frozen=True, slots=True)
class Corrected:
    """A corrected loss, the tokens that stay in it (None: all), and metrics per token and per sample."""

    loss_T: torch.Tensor
    mask_T: torch.Tensor | None = None
    token_metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    sample_metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class WeightRuleFunction(Protocol):
    """Makes bounded weights from log-ratios."""

    def __call__(self, log_ratio_T: torch.Tensor, *, low: float, high: float) -> ImportanceWeights: ...


class Correction(Protocol):
    """Weights the policy loss of each token, or takes tokens out of it."""

    def __call__(self, loss_T: torch.Tensor, train_logp_T: torch.Tensor, batch: LossBatch) -> Corrected:
        """Correct ``loss_T``.  ``train_logp_T`` is the trainer's view of the tokens that the engine sampled."""

    def weight_totals(self, batch: LossBatch) -> torch.Tensor | None:
        """``[sum of weights, number of weights]`` of one micro-batch, fp64; None: weights are not normalized.

        The totals of an optimizer step come back as ``LossBatch.weight_scale``.
        """


def log_mismatch(train_logp_T: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """Trainer's minus engine's log-probability, 0 on masked tokens.  No gradient."""
    if batch.rollout_logp_T is None:
        raise ValueError("a correction needs the engine's log-probabilities, and this batch has none")
    return masked_log_ratio(train_logp_T.detach(), batch.rollout_logp_T, batch.masked_T)


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Weights each token by its own ratio of trainer to engine, bounded by ``rule``."""

    rule: WeightRuleFunction
    low: float
    high: float

    def __call__(self, loss_T: torch.Tensor, train_logp_T: torch.Tensor, batch: LossBatch) -> Corrected:
        weight_T, ratio_T, changed_T = self.rule(log_mismatch(train_logp_T, batch), low=self.low, high=self.high)
        metrics = {"tis": ratio_T, "tis_clipfrac": changed_T, "tis_abs": (ratio_T - 1.0).abs()}
        return Corrected(loss_T * weight_T, token_metrics=metrics)

    def weight_totals(self, batch: LossBatch) -> None:
        return None


def truncated_importance(args: Any) -> TokenWeights:
    """TIS: ratios kept within ``--tis-clip-low`` and ``--tis-clip``."""
    return TokenWeights(truncated_weights, args.tis_clip_low, args.tis_clip)


def icepop(args: Any) -> TokenWeights:
    """IcePop: ratios outside ``--tis-clip-low`` and ``--tis-clip`` become 0."""
    return TokenWeights(icepop_weights, args.tis_clip_low, args.tis_clip)


class MaskedImportance:
    """MIS: bounded weights (``--tis-mode``, ``--tis-level``), rejection (``--use-rs``), or both.

    Weights are normalized over the optimizer step rather than over a micro-batch, so that the packing does not matter.
    """

    def __init__(self, args: Any) -> None:
        tis_lower = 1.0 / args.tis_upper_bound if args.tis_lower_bound is None else args.tis_lower_bound
        self._rejection: RejectionRule | None = None
        if args.use_rs:
            self._rejection = RejectionRule(
                level=args.rs_level,
                lower=tis_lower if args.rs_lower_bound is None else args.rs_lower_bound,
                upper=args.tis_upper_bound if args.rs_upper_bound is None else args.rs_upper_bound,
                veto_threshold=args.rs_veto_threshold,
            )
        self._weights: WeightRule | None = None
        if args.use_tis or not args.use_rs:
            self._weights = WeightRule(args.tis_mode, args.tis_level, tis_lower, args.tis_upper_bound)
        self._normalizes = bool(args.tis_batch_normalize)

    def weight_totals(self, batch: LossBatch) -> torch.Tensor | None:
        if self._weights is None or not self._normalizes:
            return None
        if batch.old_logp_T is None:
            raise ValueError("weights that are normalized over a step need old_logp_T, and this batch has none")
        log_ratio_T = log_mismatch(batch.old_logp_T, batch)
        bounded = self._bounded(log_ratio_T, batch)
        mask_T, _ = self._kept(log_ratio_T, bounded, batch)
        return weight_totals(bounded.weight_T, self._weights.level, replace(batch.trainable, mask_T=mask_T))

    def __call__(self, loss_T: torch.Tensor, train_logp_T: torch.Tensor, batch: LossBatch) -> Corrected:
        log_ratio_T = log_mismatch(train_logp_T, batch)
        bounded = self._bounded(log_ratio_T, batch)
        mask_T, metrics = self._kept(log_ratio_T, bounded, batch)
        if self._weights is not None:
            metrics |= _weight_metrics(self._weights, bounded, mask_T, batch.weight_scale)
        statistics = mismatch_statistics(train_logp_T, batch.rollout_logp_T, batch.trainable)
        return Corrected(
            loss_T * (bounded.weight_T * batch.weight_scale),
            mask_T,
            {f"mis_{name}": row for name, row in (statistics.tokens | metrics).items()},
            {f"mis_{name}": row for name, row in statistics.samples.items()},
        )

    def _bounded(self, log_ratio_T: torch.Tensor, batch: LossBatch) -> Bounded:
        if self._weights is not None:
            return bounded_weights(log_ratio_T, self._weights, batch.trainable)
        one_T, zero_T = torch.ones_like(log_ratio_T), torch.zeros_like(log_ratio_T)
        return Bounded(one_T, one_T, batch.mask_T, zero_T, zero_T)

    def _kept(
        self, log_ratio_T: torch.Tensor, bounded: Bounded, batch: LossBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Tokens that stay in the loss, and metrics of the rejection."""
        if self._rejection is None:
            return bounded.mask_T, {}
        rejection = rejected(log_ratio_T, self._rejection, batch.trainable)
        metrics = {"rs_mask_fraction_low": rejection.below_T, "rs_mask_fraction_high": rejection.above_T}
        if self._rejection.veto_threshold is not None:
            metrics["rs_catastrophic_token_fraction"] = rejection.catastrophic_T
            metrics["rs_catastrophic_seq_fraction"] = rejection.vetoed_T
        return bounded.mask_T * rejection.mask_T, metrics


def _weight_metrics(
    rule: WeightRule, bounded: Bounded, mask_T: torch.Tensor, weight_scale: float
) -> dict[str, torch.Tensor]:
    kept_weight_T = bounded.weight_T * mask_T
    metrics = {
        "tis_weight_before_bound": bounded.ratio_T,
        "tis_weight_after_bound": bounded.weight_T,
        "is_ratio_mean_after_tis_rs": kept_weight_T,
        "is_ratio_mean_final": kept_weight_T * weight_scale,
    }
    if rule.mode == "truncate":
        return metrics | {"tis_truncate_fraction": bounded.above_T}
    return metrics | {
        f"tis_{rule.mode}_fraction_low": bounded.below_T,
        f"tis_{rule.mode}_fraction_high": bounded.above_T,
    }
