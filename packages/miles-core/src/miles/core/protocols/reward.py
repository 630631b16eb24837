"""Rewards: (prompt, response, label) -> score."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from miles.core.config import Config
    from miles.core.types.sample import Sample

Score = float | dict[str, Any]


class RewardFunction(Protocol):
    """``miles.rewards`` entry points and ``--custom-rm-path``.

    A coroutine function runs on the event loop; a plain function never does (it runs where it can be given a deadline).
    With ``--group-rm`` the function is called with the list of a group's samples and returns a list of scores.
    """

    def __call__(self, args: Any, sample: Sample, **kwargs: Any) -> Awaitable[Score] | Score: ...


class RewardOutcome(NamedTuple):
    """What grading one sample came to.  A failure is a value too: it never ends a rollout by itself.

    A tuple, because one is made for every sample: a frozen dataclass takes three times as long to make.
    """

    score: Score
    """The reward; of a failed grading, the configured failure value."""
    category: str = "scored"
    """Verdict (``correct``, ``wrong``, ``scored``, ``no_answer``, ``ambiguous`` ...) or kind of failure (``timeout``,
    ``crash``, ``error``, ``unparsable``, ``bad_label``, ``bad_score``, ``too_long``, ``remote_error``)."""
    detail: str = ""
    """Why, for a failure: one line."""
    seconds: float = 0.0
    """Time from the start of this grading to its end, waiting for a free worker not included."""
    failed: bool = False
    """Whether no verdict was reached."""
    masked: bool = False
    """Whether the sample is to be left out of the loss (``--rm-failure-action mask``)."""
    parts: dict[str, float] | None = None
    """Rewards of the single types, when ``--rm-type`` is a weighted sum."""

    def apply(self, sample: Sample) -> None:
        """Write the reward and its category into ``sample``."""
        sample.reward = self.score
        sample.metadata = {**sample.metadata, "reward_category": self.category}
        if self.failed:
            sample.metadata["reward_error"] = self.detail
        if self.parts is not None:
            sample.metadata["reward_parts"] = self.parts
        if self.masked:
            sample.remove_sample = True


class RewardDispatcher(Protocol):
    """Scores samples as the reward flags say.  ``miles.reward_dispatchers`` names a class of this shape.

    One object serves one event loop.  It owns worker processes and connections from its first use to ``close``.
    """

    def __init__(self, config: Config) -> None:
        """Raise ConfigError when the reward flags cannot work."""

    @staticmethod
    def check(config: Config) -> list[str]:
        """Problems with the reward flags, found before a process starts."""

    async def start(self) -> None:
        """Warm up: start the workers and import the graders.  Optional; scoring starts what it needs."""

    async def score(self, sample: Sample, *, evaluation: bool = False) -> RewardOutcome:
        """Grade one finished sample.  Does not change it.

        Raises RewardError when grading fails systematically, or at the first failure under
        ``--rm-failure-action raise``.
        """

    async def score_group(self, samples: Sequence[Sample], *, evaluation: bool = False) -> list[RewardOutcome]:
        """Grade a whole group, in order: one call of the group function under ``--group-rm``, else sample by sample."""

    def metrics(self, *, evaluation: bool = False) -> dict[str, float]:
        """Counts, shares and latencies since the last such call: ``rollout/reward/...``, or ``eval/reward/...``."""

    async def close(self) -> None:
        """End the workers and connections.  Safe to call twice."""
