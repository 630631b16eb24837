"""What the rollout side hands to the trainer: one frozen, columnar batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The samples of one rollout, or one data-parallel rank's share of them.

    Every column has one entry per sample, in the same order.  R = response tokens and T = prompt + response tokens of
    that sample.  An optional column is present for all samples or for none.
    """

    rollout_id: int
    tokens: tuple[Ints, ...]
    """[T] token ids."""
    response_lengths: tuple[int, ...]
    """R."""
    loss_masks: tuple[Floats, ...]
    """[R], 1 = trains."""
    rewards: tuple[float, ...]
    """After group normalization."""
    raw_rewards: tuple[float, ...]
    truncated: tuple[bool, ...]
    sample_indices: tuple[int, ...]
    group_indices: tuple[int, ...]
    rollout_log_probs: tuple[Floats, ...] | None = None
    """[R] natural-log probabilities under the engine."""
    teacher_log_probs: tuple[Floats, ...] | None = None
    """[R] natural-log probabilities under the teacher."""
    values: tuple[Floats, ...] | None = None
    """[R] the critic's value of the state before each token."""
    log_probs: tuple[Floats, ...] | None = None
    """[R] natural-log probabilities under the policy before it trains on this rollout."""
    ref_log_probs: tuple[Floats, ...] | None = None
    """[R] natural-log probabilities under the reference model."""
    weight_versions: tuple[Ints, ...] | None = None
    """[R] version of the engine's weights that made each token: the rollouts that had been trained on."""
    routed_experts: tuple[npt.NDArray[np.int32], ...] | None = None
    """[T - 1, layers, experts per token]."""
    extra: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Columns of a custom converter, one entry per sample."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def total_lengths(self) -> tuple[int, ...]:
        """T of each sample."""
        return tuple(len(tokens) for tokens in self.tokens)

    def having(self, columns: Mapping[str, tuple[Any, ...]]) -> RolloutBatch:
        """These samples with further ``columns``, by the names of the fields."""
        changes: dict[str, Any] = dict(columns)
        return replace(self, **changes)

    def select(self, indices: Sequence[int]) -> RolloutBatch:
        """The samples at ``indices``, in that order."""
        changes: dict[str, Any] = {}
        for spec in fields(self):
            column = getattr(self, spec.name)
            if isinstance(column, tuple):
                changes[spec.name] = tuple(column[i] for i in indices)
        changes["extra"] = {name: tuple(column[i] for i in indices) for name, column in self.extra.items()}
        return replace(self, **changes)
