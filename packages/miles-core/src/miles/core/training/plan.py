"""From a rollout to this rank's micro-batches, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from miles.core.errors import TrainingError
from miles.core.training.bins import Item
from miles.core.training.context import ContextGroup
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

    Every rank has the same number of micro-batches in a step.  Ranks that share samples have the same ones, and
    parts of each; together they hold as many tokens as their limits allow.
    """
    _check(batch, global_batch_size)
    context = ranks.context
    packing = ranks.adapted(packing)
    offsets = response_offsets(batch)
    items = _items(batch)
    steps = []
    for start in range(0, len(batch), global_batch_size):
        step = items[start : start + global_batch_size]
        micro_batches = tuple(
            pack(batch, chosen, offsets, device, context) if chosen else _filler(batch, step, offsets, device, context)
            for chosen in plan_micro_batches(step, ranks.count, packing)[ranks.index]
        )
        steps.append(StepPlan(micro_batches, tuple(float(np.sum(batch.loss_masks[item.sample])) for item in step)))
    return tuple(steps)


def _items(batch: RolloutBatch) -> list[Item]:
    """The samples; those with the same prompt are a family."""
    families: dict[bytes, int] = {}
    items = []
    for sample, (tokens, response) in enumerate(zip(batch.tokens, batch.response_lengths, strict=True)):
        prompt = len(tokens) - response
        family = families.setdefault(tokens[:prompt].tobytes(), len(families))
        items.append(Item(sample, family, prompt, response))
    return items


def _filler(
    batch: RolloutBatch, step: Sequence[Item], offsets: Ints, device: torch.device, context: ContextGroup | None
) -> MicroBatch:
    """What a rank without samples computes on: the step's shortest one."""
    shortest = min(step, key=lambda item: item.prompt + item.response)
    return pack_filler(batch, shortest.sample, offsets, device, context)


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
