"""Users' functions in the loss, behind the interfaces that the objective uses.

S = samples of one micro-batch, T = their response tokens, N = their prompt and response tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from miles.core.math.reduce import weighted_sum
from miles.core.training.corrections import Corrected
from miles.core.training.loss_batch import LossBatch, LossOutput
from miles.core.training.losses import Consumes, PgReducer, Reduction
from miles.core.training.metric_sums import AllReduce, single_rank
from miles.core.types.hooks import CustomCorrectionFunction, CustomLossFunction, PgReducerFactory


class CustomLoss:
    """A user's loss function as an objective."""

    consumes: ClassVar[Consumes] = "logits"

    def __init__(self, function: CustomLossFunction, args: Any, reduction: Reduction) -> None:
        self._function = function
        self._args = args
        self._reduction = reduction

    def denominator(self, mask_sums: Sequence[float]) -> float:
        """See ``PolicyLoss.denominator``."""
        return self._reduction.denominator(mask_sums)

    def prepare(self, batches: Sequence[LossBatch], all_reduce: AllReduce = single_rank) -> list[LossBatch]:
        """Nothing depends on other micro-batches."""
        return list(batches)

    def __call__(self, logits_NV: torch.Tensor, batch: LossBatch) -> LossOutput:
        """Loss and metrics of one micro-batch."""
        weights_T = self._reduction.weights(batch.mask_T, batch)
        loss, metrics = self._function(self._args, _columns(batch), logits_NV, lambda x_T: weighted_sum(x_T, weights_T))
        return LossOutput(loss, {"loss": loss.detach()} | {name: value.detach() for name, value in metrics.items()})


def _columns(batch: LossBatch) -> dict[str, Any]:
    columns = {
        "loss_masks": batch.mask_T,
        "advantages": batch.advantage_T,
        "returns": batch.return_T,
        "log_probs": batch.old_logp_T,
        "ref_log_probs": batch.ref_logp_T,
        "rollout_log_probs": batch.rollout_logp_T,
        "values": batch.old_value_T,
    }
    split = {name: batch.layout.split(column) for name, column in columns.items() if column is not None}
    return split | {
        "tokens": batch.tokens,
        "total_lengths": _total_lengths(batch),
        "response_lengths": batch.layout.lengths,
    }


def _total_lengths(batch: LossBatch) -> tuple[int, ...]:
    if batch.total_lengths is None:
        raise ValueError("a function of the user's needs total_lengths, and this batch has none")
    return batch.total_lengths


class CustomCorrection:
    """A user's correction function behind ``Correction``."""

    def __init__(self, function: CustomCorrectionFunction, args: Any) -> None:
        self._function = function
        self._args = args

    def __call__(self, loss_T: torch.Tensor, train_logp_T: torch.Tensor, batch: LossBatch) -> Corrected:
        if batch.rollout_logp_T is None:
            raise ValueError("a correction needs the engine's log-probabilities, and this batch has none")
        split = batch.layout.split
        corrected_T, masks, metrics = self._function(
            args=self._args,
            pg_loss=loss_T,
            train_log_probs=split(train_logp_T),
            rollout_log_probs=split(batch.rollout_logp_T),
            loss_masks=split(batch.mask_T),
            total_lengths=_total_lengths(batch),
            response_lengths=batch.layout.lengths,
            parallel_state=None,
            max_seq_lens=None,
        )
        mask_T = torch.cat([mask.to(loss_T.dtype) for mask in masks]) if masks else batch.mask_T
        return Corrected(corrected_T, mask_T, {name: row.detach().to(loss_T.dtype) for name, row in metrics.items()})

    def weight_totals(self, batch: LossBatch) -> None:
        return None


def custom_reducer(factory: PgReducerFactory, *, per_token: bool) -> PgReducer:
    """A user's reducer of the policy loss behind ``PgReducer``."""

    def reduce(loss_T: torch.Tensor, mask_T: torch.Tensor, batch: LossBatch) -> torch.Tensor:
        lengths = batch.layout.lengths
        return factory(_total_lengths(batch), lengths, batch.layout.split(mask_T), per_token)(loss_T)

    return reduce
