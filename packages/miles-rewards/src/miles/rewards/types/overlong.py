"""``overlong``: DAPO's soft punishment of long responses (arXiv:2503.14476, section 3.4), between -1 and 0.

Meant as a term of a sum: ``--rm-type dapo:1,overlong:1``.  0 up to ``--rollout-max-response-len`` minus
``--rm-overlong-buffer-len`` tokens, then linearly down to -1 at the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles.core.errors import ConfigError
from miles.core.protocols.reward import RewardOutcome
from miles.rewards.context import Context
from miles.rewards.verdict import outcome_of

if TYPE_CHECKING:
    from miles.core.protocols.reward import Score
    from miles.core.types.sample import Sample


def overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """Punishment of a response of ``length`` tokens; ``buffer`` is the number of tokens over which it grows to -1."""
    return max(-1.0, min(0.0, (max_length - buffer - length) / buffer))


@dataclass(frozen=True)
class Overlong:
    """The reward type."""

    name: str = "overlong"

    def scorer(self, context: Context) -> OverlongScorer:
        settings = context.settings
        if settings.max_response_len is None:
            raise ConfigError("--rm-type overlong needs --rollout-max-response-len of a run, the length that costs 1")
        if settings.overlong_buffer_len > settings.max_response_len:
            raise ConfigError(
                f"--rm-overlong-buffer-len {settings.overlong_buffer_len} is longer than the longest response, "
                f"--rollout-max-response-len {settings.max_response_len}"
            )
        return OverlongScorer(settings.max_response_len, settings.overlong_buffer_len)

    async def __call__(self, args: Any, sample: Sample, **kwargs: Any) -> Score:
        return overlong_penalty(sample.response_length, args.rollout_max_response_len, args.rm_overlong_buffer_len)


class OverlongScorer:
    """Measures responses."""

    def __init__(self, max_length: int, buffer: int) -> None:
        self._max_length = max_length
        self._buffer = buffer

    async def score(self, sample: Sample) -> RewardOutcome:
        return outcome_of(overlong_penalty(sample.response_length, self._max_length, self._buffer), 0.0, 0.0)

    async def close(self) -> None:
        """Nothing to give back."""


reward = Overlong()
