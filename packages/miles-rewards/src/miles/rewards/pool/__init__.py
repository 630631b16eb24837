"""Killable processes for graders, ours and users'."""

from miles.rewards.pool.job import OPEN_LIMITS, Job, Limits
from miles.rewards.pool.pool import Pool
from miles.rewards.pool.results import Result, Results

__all__ = ["OPEN_LIMITS", "Job", "Limits", "Pool", "Result", "Results"]
