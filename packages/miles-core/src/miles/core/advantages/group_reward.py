"""Rewards relative to those of the same prompt.  Needs NumPy only.

S = samples of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_EPSILON = 1e-6
"""Added to the standard deviation, as everywhere in the field."""


@dataclass(frozen=True, slots=True)
class GroupNormalization:
    """Whether rewards lose their group's mean, and whether they are divided by its standard deviation."""

    mean: bool = True
    std: bool = True

    @classmethod
    def of(cls, estimator: str, *, rewards_normalization: bool, std_normalization: bool) -> GroupNormalization:
        """What an advantage estimator wants.  Estimators other than the group-relative ones get raw rewards."""
        mean = rewards_normalization and estimator in ("grpo", "gspo", "reinforce_plus_plus_baseline")
        return cls(mean=mean, std=mean and std_normalization and estimator in ("grpo", "gspo"))


def normalize_group_rewards(
    rewards: Sequence[float] | Floats,
    group_indices: Sequence[int],
    normalization: GroupNormalization,
    execution_ids: Sequence[int] | None = None,
) -> Floats:
    """Each sample's reward relative to its group's: [S].  A group is all samples with one index, wherever they are.

    A reward of NaN means "not scored": the sample takes no part in its group's statistics and gets 0, so that it
    teaches nothing.  A group with one scored sample is centred to 0 and not divided.  A group of equal rewards becomes
    0.  The standard deviation is the unbiased one.

    Samples of one execution (equal ``execution_ids``) carry one reward, which counts once.  Raises ValueError when they
    do not, when a reward is infinite, and for NaN where rewards are not normalized, because then there is no neutral
    value.
    """
    values = np.asarray(rewards, dtype=np.float64)
    _refuse_unusable(values, normalization)
    if not normalization.mean:
        return values
    result = np.zeros_like(values)
    groups: dict[int, list[int]] = {}
    for position, group in enumerate(group_indices):
        if not np.isnan(values[position]):
            groups.setdefault(group, []).append(position)
    for members in groups.values():
        counted = members if execution_ids is None else _one_per_execution(members, values, execution_ids)
        result[members] = _relative(values[members], values[counted], normalization)
    return result


def _relative(rewards: Floats, counted: Floats, normalization: GroupNormalization) -> Floats:
    if counted.min() == counted.max():
        return np.zeros_like(rewards)
    centred: Floats = rewards - counted.mean()
    return centred / (counted.std(ddof=1) + _EPSILON) if normalization.std else centred


def _one_per_execution(members: list[int], rewards: Floats, execution_ids: Sequence[int]) -> list[int]:
    first: dict[int, int] = {}
    for position in members:
        known = first.setdefault(execution_ids[position], position)
        if rewards[known] != rewards[position]:
            raise ValueError(
                f"samples {known} and {position} come from one execution ({execution_ids[position]}) "
                f"but have different rewards ({rewards[known]} and {rewards[position]}); "
                "give all of them the execution's reward"
            )
    return list(first.values())


def _refuse_unusable(rewards: Floats, normalization: GroupNormalization) -> None:
    wrong = np.isinf(rewards) if normalization.mean else ~np.isfinite(rewards)
    if wrong.any():
        positions = np.flatnonzero(wrong).tolist()
        raise ValueError(
            f"rewards must be finite, but those of the samples {positions[:10]} are "
            f"{rewards[positions[:10]].tolist()}; correct the reward function, or remove these samples"
        )
