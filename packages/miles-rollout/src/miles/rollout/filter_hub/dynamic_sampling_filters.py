"""Dynamic sampling filters: whether a finished group is worth training on."""

from __future__ import annotations

import math
import statistics
from typing import Any

from miles.core.types.rollout import DynamicFilterOutput
from miles.core.types.sample import Group, Status

_MIN_STD = 1e-8
"""Below this, rewards differ by rounding only."""


def check_reward_nonzero_std(args: Any, samples: Group, **kwargs: Any) -> DynamicFilterOutput:
    """Keep a group whose rewards differ: equal rewards give no advantage.  A group of one is dropped."""
    rewards = [sample.get_reward_value(args) for sample in samples]
    # NaN compares false, so a group with one is dropped as well.
    keep = len(rewards) > 1 and statistics.stdev(rewards) > _MIN_STD if all(map(math.isfinite, rewards)) else False
    return DynamicFilterOutput(keep, None if keep else f"zero_std_{round(rewards[0], 1)}")


def check_no_aborted(args: Any, samples: Group, **kwargs: Any) -> DynamicFilterOutput:
    """Keep a group without aborted samples."""
    keep = all(sample.status is not Status.ABORTED for sample in samples)
    return DynamicFilterOutput(keep, None if keep else "group_has_aborted")
