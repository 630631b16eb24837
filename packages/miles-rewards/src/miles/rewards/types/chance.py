"""``random`` and ``deterministic_random``: 0 or 1 without reading the answer, for baselines and tests of the loop."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles.core.protocols.reward import RewardOutcome
from miles.rewards.context import Context
from miles.rewards.verdict import outcome_of

if TYPE_CHECKING:
    from miles.core.protocols.reward import Score
    from miles.core.types.sample import Sample


@dataclass(frozen=True)
class Chance:
    """A reward type of coin flips."""

    name: str
    by_content: bool
    """Flip by tokens and response alone; else by the run's seed and the sample's index as well.  A resumed run repeats
    both."""

    def scorer(self, context: Context) -> ChanceScorer:
        return ChanceScorer(self, context.settings.seed)

    async def __call__(self, args: Any, sample: Sample, **kwargs: Any) -> Score:
        return (await ChanceScorer(self, args.rollout_seed).score(sample)).score


class ChanceScorer:
    """Flips the coins."""

    def __init__(self, chance: Chance, seed: int) -> None:
        self._chance = chance
        self._seed = seed

    async def score(self, sample: Sample) -> RewardOutcome:
        content = f"{sample.tokens}{sample.response}"
        text = content if self._chance.by_content else f"{self._seed}/{sample.index}/{content}"
        return outcome_of(float(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 2), 0.0, 0.0)

    async def close(self) -> None:
        """Nothing to give back."""


random = Chance("random", by_content=False)
deterministic_random = Chance("deterministic_random", by_content=True)
