"""The losses: a model's output and a micro-batch in, sums out.

T = response tokens of one micro-batch, packed; S = its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from miles.core.math.kl import KlKind, approx_kl
from miles.core.math.logprobs import LogProbs
from miles.core.math.policy import clipped_surrogate, off_policy_sequence_mask
from miles.core.math.ratio import effective_sample_ratio, importance_ratio, masked_log_ratio, sequence_log_ratio
from miles.core.math.reduce import sample_mean_weights, step_denominator, token_sum_weights, weighted_sum, weighted_sums
from miles.core.math.sft import negative_log_likelihood
from miles.core.math.value import clipped_value_loss
from miles.core.training.corrections import Corrected, Correction
from miles.core.training.loss_batch import LossBatch, LossOutput
from miles.core.training.metric_sums import AllReduce, single_rank

Consumes = Literal["logprobs", "values", "logits"]
"""What a loss takes of the model: ``LogProbs`` or values of the response tokens, or logits of all tokens."""

PgReducer = Callable[[torch.Tensor, torch.Tensor, LossBatch], torch.Tensor]
"""Reduces the policy loss: ``(loss_T, mask_T, batch) -> scalar``."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """How per-token values of a micro-batch become a sum: over samples of their means, or over tokens."""

    per_token: bool = False

    def weights(self, mask_T: torch.Tensor, batch: LossBatch) -> torch.Tensor:
        """Weight of each token.  ``mask_T`` may leave out tokens of the batch; denominators stay those of the batch."""
        if self.per_token:
            return token_sum_weights(mask_T)
        return sample_mean_weights(mask_T, batch.denominator_S, batch.layout)

    def denominator(self, mask_sums: Sequence[float]) -> float:
        """What the sum over an optimizer step is divided by, from the trainable tokens of each of its samples."""
        return step_denominator(mask_sums, per_token=self.per_token)


@dataclass(frozen=True, slots=True)
class KlTerm:
    """Penalty for leaving the reference model.  A coefficient of 0 measures without penalizing."""

    kind: KlKind
    coef: float
    unbiased: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Clipped policy gradient with its optional parts, each chosen once from the flags."""

    consumes: ClassVar[Consumes] = "logprobs"

    reduction: Reduction = Reduction()
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    sequence_ratio: bool = False
    """GSPO: one ratio per sequence."""
    opsm_delta: float | None = None
    """None: no off-policy sequence masking."""
    old_is_rollout: bool = False
    """Ratios are to the engine's log-probabilities rather than to the trainer's."""
    correction: Correction | None = None
    apply_correction: bool = True
    """False: the correction is measured, and the loss left as it is."""
    kl: KlTerm | None = None
    entropy_coef: float = 0.0
    pg_reducer: PgReducer | None = None

    def denominator(self, mask_sums: Sequence[float]) -> float:
        """What ``loss`` and the token metrics of an optimizer step are divided by; ``mask_sums`` of all its samples."""
        return self.reduction.denominator(mask_sums)

    def prepare(self, batches: Sequence[LossBatch], all_reduce: AllReduce = single_rank) -> list[LossBatch]:
        """The micro-batches of one optimizer step with what depends on all of them.  Every rank calls it."""
        if self.correction is None:
            return list(batches)
        totals = [self.correction.weight_totals(batch) for batch in batches]
        known = [total for total in totals if total is not None]
        if not known:
            return list(batches)
        weight, count = all_reduce(torch.stack(known).sum(0)).tolist()
        scale = count / weight if weight > 0 else 1.0
        return [replace(batch, weight_scale=scale) for batch in batches]

    def __call__(self, scores: LogProbs, batch: LossBatch) -> LossOutput:
        """Loss and metrics of one micro-batch."""
        logp_T = scores.logp_T
        train_logp_T = logp_T.detach() if batch.old_logp_T is None else batch.old_logp_T
        old_logp_T = _known(batch.rollout_logp_T, "rollout_logp_T") if self.old_is_rollout else train_logp_T
        log_ratio_T = masked_log_ratio(logp_T, old_logp_T, batch.masked_T)

        rows = _Rows()
        loss_T = self._surrogate(log_ratio_T, batch, rows)
        corrected = self._corrected(loss_T, train_logp_T, batch, rows)
        self._compare_with_engine(old_logp_T, batch, rows)

        weights_T = self.reduction.weights(batch.mask_T, batch)
        mask_T, loss_weights_T = batch.mask_T, weights_T
        if corrected.mask_T is not None:
            mask_T, loss_weights_T = corrected.mask_T, self.reduction.weights(corrected.mask_T, batch)
        pg_loss = self._reduce_policy_loss(corrected.loss_T, mask_T, loss_weights_T, batch)
        loss, terms = self._total(pg_loss, loss_weights_T, scores, log_ratio_T, batch)
        return LossOutput(loss, terms | weighted_sums(rows.tokens, weights_T), rows.sample_sums())

    def _surrogate(self, log_ratio_T: torch.Tensor, batch: LossBatch, rows: _Rows) -> torch.Tensor:
        """Policy loss of each token, sequences that left the policy masked."""
        advantage_T, layout = _known(batch.advantage_T, "advantage_T"), batch.layout
        log_ratio_S = None
        if self.sequence_ratio or self.opsm_delta is not None:
            log_ratio_S = sequence_log_ratio(log_ratio_T, batch.mask_T, batch.mask_sum_S, layout, batch.add)
        if self.sequence_ratio and log_ratio_S is not None:
            log_ratio_T = layout.spread(log_ratio_S)
        loss_T, clipped_T = clipped_surrogate(
            log_ratio_T, advantage_T, clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip
        )
        log_ratio_T = log_ratio_T.detach()
        ratio_T = importance_ratio(log_ratio_T)
        ess_S = effective_sample_ratio(ratio_T, batch.mask_T, batch.mask_sum_S, layout, batch.add)
        rows.tokens |= {"pg_clipfrac": clipped_T, "ppo_kl": -log_ratio_T, "ess_ratio": layout.spread(ess_S)}
        if self.correction is not None:
            rows.tokens["ois"] = ratio_T
        if self.opsm_delta is not None and log_ratio_S is not None:
            keep_T = off_policy_sequence_mask(log_ratio_S, advantage_T, layout, delta=self.opsm_delta)
            loss_T = loss_T * keep_T
            rows.samples["opsm_clipfrac"] = layout.sum(1.0 - keep_T) / batch.mask_sum_S.clamp(min=1.0)
        return loss_T

    def _corrected(self, loss_T: torch.Tensor, train_logp_T: torch.Tensor, batch: LossBatch, rows: _Rows) -> Corrected:
        if self.correction is None:
            return Corrected(loss_T)
        corrected = self.correction(loss_T, train_logp_T, batch)
        rows.tokens |= corrected.token_metrics
        rows.samples |= {name: row * batch.share_S for name, row in corrected.sample_metrics.items()}
        return corrected if self.apply_correction else Corrected(loss_T)

    @staticmethod
    def _compare_with_engine(old_logp_T: torch.Tensor, batch: LossBatch, rows: _Rows) -> None:
        if batch.rollout_logp_T is None:
            return
        mismatch_T = masked_log_ratio(old_logp_T, batch.rollout_logp_T, batch.masked_T)
        rows.tokens["train_rollout_logprob_abs_diff"] = mismatch_T.abs()
        rows.tokens["train_rollout_kl"] = approx_kl(-mismatch_T, "low_var_kl")

    def _reduce_policy_loss(
        self, loss_T: torch.Tensor, mask_T: torch.Tensor, weights_T: torch.Tensor, batch: LossBatch
    ) -> torch.Tensor:
        return weighted_sum(loss_T, weights_T) if self.pg_reducer is None else self.pg_reducer(loss_T, mask_T, batch)

    def _total(
        self,
        pg_loss: torch.Tensor,
        weights_T: torch.Tensor,
        scores: LogProbs,
        log_ratio_T: torch.Tensor,
        batch: LossBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of all terms, and each term by name."""
        loss = pg_loss
        terms = {"pg_loss": pg_loss, "entropy_loss": torch.zeros_like(pg_loss)}
        if self.entropy_coef:
            terms["entropy_loss"] = weighted_sum(_known(scores.entropy_T, "entropy_T"), weights_T)
            loss = loss - self.entropy_coef * terms["entropy_loss"]
        if self.kl is not None:
            from_ref_T = masked_log_ratio(scores.logp_T, _known(batch.ref_logp_T, "ref_logp_T"), batch.masked_T)
            sampling_T = importance_ratio(log_ratio_T) if self.kl.unbiased else None
            terms["kl_loss"] = weighted_sum(approx_kl(from_ref_T, self.kl.kind, sampling_T), weights_T)
            loss = loss + self.kl.coef * terms["kl_loss"]
        return loss, {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}


class _Rows:
    """Metrics of one micro-batch before their reduction: a value per token, or this rank's part of a sample's value."""

    def __init__(self) -> None:
        self.tokens: dict[str, torch.Tensor] = {}
        self.samples: dict[str, torch.Tensor] = {}

    def sample_sums(self) -> dict[str, torch.Tensor]:
        return {name: row.sum() for name, row in self.samples.items()}


@dataclass(frozen=True, slots=True)
class SftLoss:
    """Negative log-likelihood of the response tokens."""

    consumes: ClassVar[Consumes] = "logprobs"

    reduction: Reduction = Reduction()

    def denominator(self, mask_sums: Sequence[float]) -> float:
        """See ``PolicyLoss.denominator``."""
        return self.reduction.denominator(mask_sums)

    def prepare(self, batches: Sequence[LossBatch], all_reduce: AllReduce = single_rank) -> list[LossBatch]:
        """Nothing depends on other micro-batches."""
        return list(batches)

    def __call__(self, scores: LogProbs, batch: LossBatch) -> LossOutput:
        """Loss and metrics of one micro-batch."""
        weights_T = self.reduction.weights(batch.mask_T, batch)
        loss = weighted_sum(negative_log_likelihood(scores.logp_T, batch.masked_T), weights_T)
        return LossOutput(loss, {"loss": loss.detach()})


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """Clipped squared error of the critic."""

    consumes: ClassVar[Consumes] = "values"

    clip: float = 0.2
    reduction: Reduction = Reduction()

    def denominator(self, mask_sums: Sequence[float]) -> float:
        """See ``PolicyLoss.denominator``."""
        return self.reduction.denominator(mask_sums)

    def prepare(self, batches: Sequence[LossBatch], all_reduce: AllReduce = single_rank) -> list[LossBatch]:
        """Nothing depends on other micro-batches."""
        return list(batches)

    def __call__(self, value_T: torch.Tensor, batch: LossBatch) -> LossOutput:
        """Loss and metrics of one micro-batch."""
        old_value_T, return_T = _known(batch.old_value_T, "old_value_T"), _known(batch.return_T, "return_T")
        weights_T = self.reduction.weights(batch.mask_T, batch)
        loss_T, clipped_T = clipped_value_loss(value_T, old_value_T, return_T, clip=self.clip)
        loss = weighted_sum(loss_T, weights_T)
        clipped = weighted_sums({"value_clipfrac": clipped_T}, weights_T)
        return LossOutput(loss, {"loss": loss.detach(), "value_loss": loss.detach()} | clipped)


def _known(column: torch.Tensor | None, name: str) -> torch.Tensor:
    if column is None:
        raise ValueError(f"the loss needs {name}, and this batch has none")
    return column
