"""Samples as tensors: the columns of a rollout laid end to end, and the micro-batches cut from them.

P = prompt and response tokens of one micro-batch, T = its response tokens, A = response tokens of the whole rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from miles.core.math.ragged import Ragged
from miles.core.training.segments import Segments
from miles.core.types.batch import Ints, RolloutBatch


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples packed end to end, without padding, for one forward pass."""

    samples: tuple[int, ...]
    """Positions in the rollout's columns."""
    segments: Segments
    layout: Ragged
    """Where each sample's response tokens lie among the T."""
    tokens_P: torch.Tensor
    positions_P: torch.Tensor
    """Position of each token in its own sample."""
    rows_T: torch.Tensor
    """Row of the pack whose output predicts each response token."""
    targets_T: torch.Tensor
    """The response tokens themselves."""
    columns_T: torch.Tensor
    """Place of each response token in the rollout's columns of A."""


def response_offsets(batch: RolloutBatch) -> Ints:
    """[samples + 1] where the response of each sample begins in the rollout's columns of A."""
    return np.concatenate([[0], np.cumsum(batch.response_lengths)]).astype(np.int64)


def pack(batch: RolloutBatch, samples: Sequence[int], offsets: Ints, device: torch.device) -> MicroBatch:
    """The micro-batch of ``samples``, in that order.  ``offsets`` are the rollout's ``response_offsets``."""
    return _packed(batch, samples, [batch.response_lengths[i] for i in samples], offsets, device)


def pack_filler(batch: RolloutBatch, sample: int, offsets: Ints, device: torch.device) -> MicroBatch:
    """A micro-batch that computes on ``sample`` and trains on nothing: it keeps a rank without samples in step."""
    return _packed(batch, [sample], [0], offsets, device)


def _packed(
    batch: RolloutBatch, samples: Sequence[int], responses: Sequence[int], offsets: Ints, device: torch.device
) -> MicroBatch:
    lengths = [len(batch.tokens[i]) for i in samples]
    tokens = np.concatenate([batch.tokens[i] for i in samples]).astype(np.int64, copy=False)
    targets = _ranges(np.cumsum(lengths) - np.asarray(responses, dtype=np.int64), responses)

    def tensor(array: Ints) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return MicroBatch(
        samples=tuple(samples),
        segments=Segments(lengths, device),
        layout=Ragged(responses, device),
        tokens_P=tensor(tokens),
        positions_P=tensor(_ranges(np.zeros(len(lengths), dtype=np.int64), lengths)),
        rows_T=tensor(targets - 1),
        targets_T=tensor(tokens[targets]),
        columns_T=tensor(_ranges(offsets[list(samples)], responses)),
    )


def _ranges(starts: Ints, lengths: Sequence[int]) -> Ints:
    """``starts[0], starts[0] + 1, ...`` for ``lengths[0]`` entries, then the same from ``starts[1]``, and so on."""
    counts = np.asarray(lengths, dtype=np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())
