"""Killable processes for graders, ours and users'."""

from miles.rewards.pool.job import OPEN_LIMITS, Job, Limits, Result
from miles.rewards.pool.pool import Pool

__all__ = ["OPEN_LIMITS", "Job", "Limits", "Pool", "Result"]
