"""The per-token columns of one rollout, on every rank, laid end to end.

S = samples of the rollout, A = their response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from miles.core.advantages.estimate import AdvantageInputs, Advantages
from miles.core.math.ragged import Ragged
from miles.core.math.ratio import whole_sample
from miles.core.math.reduce import sample_mean_weights
from miles.core.training.loss_batch import LossBatch
from miles.core.training.micro_batch import MicroBatch
from miles.core.types.batch import Floats, RolloutBatch


@dataclass(slots=True)
class Columns:
    """What is known of each response token.  Filled in as training on the rollout goes on; None = not known."""

    layout: Ragged
    mask_A: torch.Tensor
    reward_S: torch.Tensor
    rollout_logp_A: torch.Tensor | None = None
    teacher_logp_A: torch.Tensor | None = None
    ref_logp_A: torch.Tensor | None = None
    old_logp_A: torch.Tensor | None = None
    entropy_A: torch.Tensor | None = None
    value_A: torch.Tensor | None = None
    advantage_A: torch.Tensor | None = None
    return_A: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: RolloutBatch, device: torch.device) -> Columns:
        """The columns that come with the rollout."""
        return cls(
            layout=Ragged(batch.response_lengths, device),
            mask_A=_flat(batch.loss_masks, device),
            reward_S=torch.tensor(batch.rewards, dtype=torch.float32, device=device),
            rollout_logp_A=_flat_if_known(batch.rollout_log_probs, device),
            teacher_logp_A=_flat_if_known(batch.teacher_log_probs, device),
            ref_logp_A=_flat_if_known(batch.ref_log_probs, device),
            old_logp_A=_flat_if_known(batch.log_probs, device),
            value_A=_flat_if_known(batch.values, device),
        )

    def advantage_inputs(self) -> AdvantageInputs:
        """What advantages are computed from."""
        return AdvantageInputs(
            layout=self.layout,
            mask_A=self.mask_A,
            reward_S=self.reward_S,
            old_logp_A=self.old_logp_A,
            rollout_logp_A=self.rollout_logp_A,
            ref_logp_A=self.ref_logp_A,
            teacher_logp_A=self.teacher_logp_A,
            value_A=self.value_A,
        )

    def take_advantages(self, advantages: Advantages) -> None:
        """Keep what was computed."""
        self.advantage_A, self.return_A = advantages.advantage_A, advantages.return_A

    def per_sample(self, column_A: torch.Tensor) -> tuple[Floats, ...]:
        """One array per sample, as a ``RolloutBatch`` has them."""
        return tuple(part.numpy() for part in column_A.cpu().split(self.layout.lengths))

    def loss_batch(self, micro_batch: MicroBatch, *, with_tokens: bool = False) -> LossBatch:
        """The columns of one micro-batch's tokens; and their ids, which only a user's loss looks at."""

        def part(column_A: torch.Tensor | None) -> torch.Tensor | None:
            return None if column_A is None else column_A.index_select(0, micro_batch.columns_T)

        return LossBatch(
            layout=micro_batch.layout,
            mask_T=self.mask_A.index_select(0, micro_batch.columns_T),
            advantage_T=part(self.advantage_A),
            return_T=part(self.return_A),
            old_logp_T=part(self.old_logp_A),
            ref_logp_T=part(self.ref_logp_A),
            rollout_logp_T=part(self.rollout_logp_A),
            old_value_T=part(self.value_A),
            given_mask_sum_S=self._mask_sums(micro_batch),
            add=whole_sample if micro_batch.context is None else micro_batch.context.sum,
            total_lengths=micro_batch.segments.lengths,
            tokens=micro_batch.whole_samples() if with_tokens else None,
        )

    def _mask_sums(self, micro_batch: MicroBatch) -> torch.Tensor | None:
        """Trained tokens of each whole sample, where this rank has parts of them."""
        if micro_batch.context is None:
            return None
        return self.layout.sum(self.mask_A)[list(micro_batch.samples)]

    def broken_samples(self, *further_A: torch.Tensor) -> list[int]:
        """Positions of the samples with a value that is not finite, in any column or in ``further_A``."""
        columns = [self.mask_A, *further_A, *(column for column in self._measured().values() if column is not None)]
        bad_A = ~torch.isfinite(torch.stack(columns).sum(0))
        positions: list[int] = self.layout.sum(bad_A.float()).nonzero().flatten().tolist()
        return positions

    def means(self) -> dict[str, float]:
        """Mean over samples of the masked mean over tokens, of every column there is, as it is logged."""
        known = {name: column for name, column in self._measured().items() if column is not None}
        if not known:
            return {}
        weights_A = sample_mean_weights(self.mask_A, self.layout.sum(self.mask_A), self.layout)
        sums = torch.stack(list(known.values())).double() @ weights_A.double()
        return {name: value / self.layout.num_samples for name, value in zip(known, sums.tolist(), strict=True)}

    def entropy_of(self, raw_rewards: Sequence[float]) -> dict[str, float]:
        """Mean over the samples with a reward of 1 of their mean entropy, as it is logged; nothing without one."""
        correct = torch.tensor([reward == 1 for reward in raw_rewards])
        if self.entropy_A is None or not correct.any():
            return {}
        masses = self.layout.sum(self.mask_A)
        means = self.layout.sum(self.entropy_A * self.mask_A) / masses.clamp_min(1)
        return {"correct_entropy": float(means.cpu()[correct].mean())}

    def known(self) -> dict[str, torch.Tensor]:
        """Every column there is, by the name that users know it by."""
        columns = {
            "loss_masks": self.mask_A,
            "log_probs": self.old_logp_A,
            "ref_log_probs": self.ref_logp_A,
            "rollout_log_probs": self.rollout_logp_A,
            "teacher_log_probs": self.teacher_logp_A,
            "values": self.value_A,
            "entropy": self.entropy_A,
            "advantages": self.advantage_A,
            "returns": self.return_A,
        }
        return {name: column for name, column in columns.items() if column is not None}

    def for_hook(self, batch: RolloutBatch) -> dict[str, Any]:
        """Everything that is known, one entry per sample.  Advantages and returns are views: they may be changed."""
        mine = {name: self.layout.split(column) for name, column in self.known().items()}
        mine["loss_masks"] = self.layout.split(self.mask_A.clone())
        return mine | {
            "tokens": [torch.from_numpy(tokens) for tokens in batch.tokens],
            "response_lengths": batch.response_lengths,
            "total_lengths": batch.total_lengths,
            "rewards": batch.rewards,
            "raw_reward": batch.raw_rewards,
            "truncated": batch.truncated,
            "sample_indices": batch.sample_indices,
            "rollout_id": batch.rollout_id,
        }

    def _reverse_kl(self) -> torch.Tensor | None:
        """From the teacher, as the old policy sampled it."""
        if self.teacher_logp_A is None or self.old_logp_A is None:
            return None
        return self.old_logp_A - self.teacher_logp_A

    def _measured(self) -> dict[str, torch.Tensor | None]:
        return {
            "rollout/log_probs": self.old_logp_A,
            "rollout/ref_log_probs": self.ref_logp_A,
            "rollout/rollout_log_probs": self.rollout_logp_A,
            "rollout/teacher_log_probs": self.teacher_logp_A,
            "rollout/entropy": self.entropy_A,
            "rollout/opd_reverse_kl": self._reverse_kl(),
            "rollout/values": self.value_A,
            "rollout/advantages": self.advantage_A,
            "rollout/returns": self.return_A,
        }


def batch_means(batch: RolloutBatch) -> dict[str, float]:
    """Mean over samples of every number that a sample has, as it is logged."""
    numbers = {
        "rollout/rewards": batch.rewards,
        "rollout/raw_reward": batch.raw_rewards,
        "rollout/truncated": batch.truncated,
        "rollout/response_lengths": batch.response_lengths,
        "rollout/total_lengths": batch.total_lengths,
    }
    return {name: float(np.mean(values)) for name, values in numbers.items()}


def _flat(column: tuple[Floats, ...], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(column).astype(np.float32, copy=False)).to(device)


def _flat_if_known(column: tuple[Floats, ...] | None, device: torch.device) -> torch.Tensor | None:
    return None if column is None else _flat(column, device)
