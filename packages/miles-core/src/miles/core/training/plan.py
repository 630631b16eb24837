"""From a rollout to this rank's micro-batches, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from miles.core.errors import TrainingError
from miles.core.training.micro_batch import MicroBatch, pack, pack_filler, response_offsets
from miles.core.training.packing import Packing, plan_micro_batches
from miles.core.training.ranks import Ranks
from miles.core.types.batch import Ints, RolloutBatch


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step, and this rank's part of it."""

    micro_batches: tuple[MicroBatch, ...]
    mask_sums: tuple[float, ...]
    """Trained tokens of each sample of the step, over all ranks."""


def plan_rollout(
    batch: RolloutBatch, global_batch_size: int, packing: Packing, ranks: Ranks, device: torch.device
) -> tuple[StepPlan, ...]:
    """Cut ``batch`` into steps of ``global_batch_size`` samples and pack this rank's share of each.

    Every rank has the same number of micro-batches in a step.
    """
    _check(batch, global_batch_size)
    offsets = response_offsets(batch)
    steps = []
    for start in range(0, len(batch), global_batch_size):
        samples = range(start, start + global_batch_size)
        bins = plan_micro_batches([len(batch.tokens[i]) for i in samples], ranks.count, packing)[ranks.index]
        micro_batches = tuple(_packed(batch, [start + i for i in chosen], samples, offsets, device) for chosen in bins)
        steps.append(StepPlan(micro_batches, tuple(float(np.sum(batch.loss_masks[i])) for i in samples)))
    return tuple(steps)


def _packed(
    batch: RolloutBatch, chosen: list[int], samples: Sequence[int], offsets: Ints, device: torch.device
) -> MicroBatch:
    """The micro-batch of ``chosen``; where there is none, one that computes on the step's shortest sample."""
    if chosen:
        return pack(batch, chosen, offsets, device)
    return pack_filler(batch, min(samples, key=lambda i: len(batch.tokens[i])), offsets, device)


def _check(batch: RolloutBatch, global_batch_size: int) -> None:
    if len(batch) == 0 or len(batch) % global_batch_size:
        raise TrainingError(
            f"rollout {batch.rollout_id} has {len(batch)} samples, which do not make whole steps of "
            f"--global-batch-size {global_batch_size}; let the rollout return a multiple of it"
        )
    unprompted = [
        index
        for index, tokens, response in zip(batch.sample_indices, batch.tokens, batch.response_lengths, strict=True)
        if response >= len(tokens)
    ]
    if unprompted:
        raise TrainingError(
            f"rollout {batch.rollout_id}: the samples {unprompted} have no prompt token, "
            "so that nothing predicts the first token of their response"
        )
