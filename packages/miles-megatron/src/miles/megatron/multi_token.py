"""Training of the layers that predict further tokens, beside the policy.

Each of them predicts every trained response token once more, from one token further back.  T = response tokens of a
micro-batch, A = those of the rollout, U = those predicted on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron.core import parallel_state
from miles.core.protocols.backend import TrainReport
from miles.core.training.micro_batch import MicroBatch
from miles.core.types.batch import RolloutBatch
from miles.megatron.language_model import Head, LanguageModel
from miles.megatron.packed_inputs import PackedInputs


class MultiTokenLoss:
    """Mean cross entropy over the trained tokens of a step and over the layers, times ``factor``."""

    def __init__(self, head: Head, *, layers: int, factor: float, device: torch.device) -> None:
        self.layers = layers
        self._head = head
        self._factor = factor
        self._device = device
        self._mask_A = torch.zeros(0, device=device)
        self._total = torch.ones((), device=device)
        self._losses: list[torch.Tensor] = []

    def begin(self, batch: RolloutBatch) -> None:
        """A new rollout."""
        self._mask_A = torch.cat([torch.from_numpy(mask) for mask in batch.loss_masks]).to(self._device)
        self._losses = []

    def begin_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A new step of these micro-batches on this rank.  Collective."""
        total = sum((self._mask(micro_batch).sum() for micro_batch in micro_batches), self._mask_A.new_zeros(()))
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        self._total = total.clamp(min=1.0)
        self._losses.append(torch.zeros((), device=self._device))

    def __call__(self, model: LanguageModel, states: Sequence[torch.Tensor], inputs: PackedInputs) -> torch.Tensor:
        """The part of the loss that this micro-batch has on this rank, from each layer's hidden states."""
        mask_T = self._mask(inputs.source)
        loss = self._mask_A.new_zeros(())
        for hidden, ahead in zip(states, inputs.ahead, strict=True):
            logp_U = self._head.log_probs_ahead(model, hidden, ahead)
            loss = loss - (logp_U * mask_T.index_select(0, ahead.slots_U)).sum()
        loss = loss / (self._total * self.layers)
        self._losses[-1] += loss.detach()
        return self._factor * loss

    def told_in(self, report: TrainReport) -> TrainReport:
        """``report`` with the loss of each step, without its factor.  Collective."""
        if not self._losses:
            return report
        losses = torch.stack(self._losses)
        dist.all_reduce(losses, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(losses, last, group=parallel_state.get_pipeline_model_parallel_group())
        steps = zip(report.steps, losses.tolist(), strict=True)
        return replace(report, steps=tuple({**step, "train/mtp_loss": loss} for step, loss in steps))

    def _mask(self, micro_batch: MicroBatch) -> torch.Tensor:
        return self._mask_A.index_select(0, micro_batch.columns_T)
