"""Flags of grading.  Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from miles.core.config.group import Group


class RewardExecution(Group):
    title = "Reward Execution"

    rm_num_workers: NonNegativeInt = 0
    """Processes that grade. ``0``: a quarter of the cores, from 2 to 8."""

    rm_timeout: PositiveFloat | None = None
    """Seconds one grading may take. Defaults to the reward type's own limit (2 for mathematics); 120 for functions of
    your own and for remote services."""

    rm_concurrency: PositiveInt = 64
    """Most calls in flight of an asynchronous reward function, and to a remote reward service."""

    rm_failure_action: Literal["score", "mask", "raise"] = "score"
    """What a response that could not be graded (time-out, crash, error, bad label) means: ``score`` trains on the
    failure's value, ``mask`` keeps the sample out of the loss, ``raise`` ends the run."""

    rm_failure_values: dict[str, float] = Field(default_factory=dict)
    """Rewards by category, such as ``{"timeout": -0.5, "no_answer": -1}``, in place of the type's reward for a wrong
    answer. Categories: ``timeout``, ``crash``, ``error``, ``bad_label``, ``bad_score``, ``too_long``, ``remote_error``,
    and the verdicts ``no_answer``, ``unparsable``, ``ambiguous``."""

    rm_max_consecutive_failures: NonNegativeInt = 64
    """End the run when this many gradings in a row failed. ``0``: never."""

    rm_strict_upstream: bool = False
    """Grade as the original graders do, their known mistakes included."""

    rm_overlong_buffer_len: PositiveInt = 4096
    """Tokens before ``--rollout-max-response-len`` over which the reward type ``overlong`` falls from 0 to -1."""


GROUPS: tuple[type[Group], ...] = (RewardExecution,)
