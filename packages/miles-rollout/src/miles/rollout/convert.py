"""From samples to the trainer's batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from miles.core.advantages.group_reward import GroupNormalization, normalize_group_rewards
from miles.core.errors import RolloutError
from miles.core.flags.algorithm import Algorithm
from miles.core.types.batch import RolloutBatch
from miles.core.types.sample import Sample, Status


def train_rewards(
    samples: Sequence[Sample], algorithm: Algorithm, reward_key: str | None
) -> tuple[list[float], list[float]]:
    """Raw rewards, and rewards normalized within their group where the advantage estimator wants it."""
    normalization = GroupNormalization.of(
        algorithm.advantage_estimator,
        rewards_normalization=algorithm.rewards_normalization,
        std_normalization=algorithm.grpo_std_normalization,
    )
    try:
        raw = [sample.reward_value(reward_key) for sample in samples]
        groups = [_known(sample.group_index, "group_index", sample) for sample in samples]
        executions = [_execution(sample) for sample in samples]
        return raw, normalize_group_rewards(raw, groups, normalization, executions).tolist()
    except ValueError as error:
        raise RolloutError(str(error)) from error


def to_batch(
    rollout_id: int, samples: Sequence[Sample], raw_rewards: Sequence[float], rewards: Sequence[float]
) -> RolloutBatch:
    """Columns of ``samples``.  RolloutError when samples disagree about which columns there are."""
    for sample in samples:
        sample.validate()
    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=_arrays([sample.tokens for sample in samples], np.int64),
        response_lengths=tuple(sample.response_length for sample in samples),
        loss_masks=_arrays([loss_mask(sample) for sample in samples], np.float32),
        rewards=tuple(map(float, rewards)),
        raw_rewards=tuple(map(float, raw_rewards)),
        truncated=tuple(sample.status is Status.TRUNCATED for sample in samples),
        sample_indices=tuple(_known(sample.index, "index", sample) for sample in samples),
        group_indices=tuple(_known(sample.group_index, "group_index", sample) for sample in samples),
        rollout_log_probs=_optional(samples, "rollout_log_probs", np.float32),
        teacher_log_probs=_optional(samples, "teacher_log_probs", np.float32),
        weight_versions=_weight_versions(samples),
        routed_experts=_optional(samples, "rollout_routed_experts", np.int32),
        extra=_metadata_column(samples),
    )


def loss_mask(sample: Sample) -> list[int]:
    """R entries: the sample's own mask, ones without one, zeros for a removed sample."""
    if sample.remove_sample:
        return [0] * sample.response_length
    return [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask


def to_custom_batch(rollout_id: int, columns: Mapping[str, Sequence[Any]]) -> RolloutBatch:
    """The batch of a ``--custom-convert-samples-to-train-data-path`` hook; RolloutError names what is wrong with it."""
    missing = [name for name in ("tokens", "response_lengths", "rewards") if name not in columns]
    if missing:
        raise RolloutError(f"--custom-convert-samples-to-train-data-path returned no {', '.join(missing)}")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise RolloutError(
            f"--custom-convert-samples-to-train-data-path returned columns of unequal lengths: {lengths}"
        )
    size = lengths["tokens"]

    def column(name: str, default: Callable[[int], Any]) -> Sequence[Any]:
        return columns[name] if name in columns else [default(index) for index in range(size)]

    def arrays(name: str, dtype: Any) -> tuple[Any, ...] | None:
        return _arrays(columns[name], dtype) if name in columns else None

    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=_arrays(columns["tokens"], np.int64),
        response_lengths=tuple(map(int, columns["response_lengths"])),
        loss_masks=_arrays(column("loss_masks", lambda index: [1] * columns["response_lengths"][index]), np.float32),
        rewards=tuple(map(float, columns["rewards"])),
        raw_rewards=tuple(map(float, column("raw_reward", lambda index: columns["rewards"][index]))),
        truncated=tuple(map(bool, column("truncated", lambda index: False))),
        sample_indices=tuple(map(int, column("sample_indices", lambda index: index))),
        group_indices=tuple(map(int, column("group_indices", lambda index: index))),
        rollout_log_probs=arrays("rollout_log_probs", np.float32),
        teacher_log_probs=arrays("teacher_log_probs", np.float32),
        weight_versions=arrays("weight_versions", np.int64),
        routed_experts=arrays("rollout_routed_experts", np.int32),
        extra={name: tuple(values) for name, values in columns.items() if name not in _KNOWN_COLUMNS},
    )


_KNOWN_COLUMNS = frozenset(
    {
        "tokens",
        "response_lengths",
        "loss_masks",
        "rewards",
        "raw_reward",
        "truncated",
        "sample_indices",
        "group_indices",
        "rollout_log_probs",
        "teacher_log_probs",
        "weight_versions",
        "rollout_routed_experts",
    }
)


def trim(batch: RolloutBatch, multiple: int) -> RolloutBatch:
    """Leave out the last samples that do not fill an optimizer step; RolloutError when nothing is left."""
    kept = len(batch) // multiple * multiple
    if kept == 0:
        raise RolloutError(
            f"rollout {batch.rollout_id} has {len(batch)} samples, less than --global-batch-size {multiple}: there is "
            "nothing to train on. Lower it, or give --use-dynamic-global-batch-size"
        )
    return batch if kept == len(batch) else batch.select(range(kept))


def _arrays(rows: Sequence[Any], dtype: Any) -> tuple[Any, ...]:
    return tuple(np.asarray(row, dtype) for row in rows)


def _optional(samples: Sequence[Sample], name: str, dtype: Any) -> tuple[Any, ...] | None:
    """The column when every sample has it, None when none has."""
    values = [getattr(sample, name) for sample in samples]
    absent = [sample.index for sample, value in zip(samples, values, strict=True) if value is None]
    if len(absent) == len(samples):
        return None
    if absent:
        raise RolloutError(
            f"{len(absent)} of {len(samples)} samples have no {name} (sample {absent[0]} is the first): a generate "
            "function must set it for all samples or for none"
        )
    return _arrays(values, dtype)


def _weight_versions(samples: Sequence[Sample]) -> tuple[Any, ...] | None:
    """The weights that made each token, where all engines count their versions."""
    versions = [sample.token_weight_versions if sample.response_length else [] for sample in samples]
    known = [made for made in versions if made is not None]
    return _arrays(known, np.int64) if len(known) == len(samples) else None


def _metadata_column(samples: Sequence[Sample]) -> dict[str, tuple[Any, ...]]:
    if all(sample.train_metadata is None for sample in samples):
        return {}
    return {"metadata": tuple(sample.train_metadata for sample in samples)}


def _execution(sample: Sample) -> int:
    return _known(sample.index if sample.rollout_id is None else sample.rollout_id, "index", sample)


def _known(value: int | None, name: str, sample: Sample) -> int:
    if value is None:
        raise RolloutError(f"a sample has no {name} (prompt {str(sample.prompt)[:80]!r}): the data source must set it")
    return value
