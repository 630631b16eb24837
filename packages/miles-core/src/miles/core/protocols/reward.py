"""Rewards: (prompt, response, label) -> score."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

from miles.core.types.sample import Sample

Score = float | dict[str, Any]


class RewardFunction(Protocol):
    """``miles.rewards`` entry points and ``--custom-rm-path``.

    A coroutine function runs on the event loop; a plain function never does (it runs where it can be given a deadline).
    With ``--group-rm`` the function is called with the list of a group's samples and returns a list of scores.
    """

    def __call__(self, args: Any, sample: Sample, **kwargs: Any) -> Awaitable[Score] | Score: ...
