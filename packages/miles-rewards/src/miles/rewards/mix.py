"""Weighted sums of reward types: ``math:1,format:0.1``."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles.core.errors import ConfigError
from miles.core.protocols.reward import RewardOutcome, Score
from miles.rewards.scorer import Scorer, score_all
from miles.rewards.verdict import entry_of

if TYPE_CHECKING:
    from miles.core.types.sample import Sample


@dataclass(frozen=True, slots=True)
class Part:
    """One term of the sum."""

    name: str
    weight: float


def parse_mix(text: str) -> list[Part]:
    """The terms of ``--rm-type``; one without a finite weight counts once: ``module:attribute`` is a name."""
    return [_part(term.strip()) for term in text.split(",")]


def _part(term: str) -> Part:
    name, _, given = term.rpartition(":")
    try:
        weight = float(given)
    except ValueError:
        weight = math.nan
    return Part(name.strip(), weight) if name and math.isfinite(weight) else Part(term, 1.0)


class MixScorer:
    """Scores with several types at once and adds the rewards."""

    def __init__(self, parts: Sequence[tuple[Part, Scorer]], reward_key: str | None) -> None:
        """``reward_key`` is the entry of rewards that are mappings; ``score`` where they have none of that name."""
        self._parts = parts
        self._reward_key = reward_key

    async def score(self, sample: Sample) -> RewardOutcome:
        return (await self.score_many([sample]))[0]

    async def score_many(self, samples: Sequence[Sample]) -> list[RewardOutcome]:
        """Sums of the samples' rewards, in order."""
        columns = await asyncio.gather(*(score_all(scorer, samples) for _, scorer in self._parts))
        return list(map(self._sum, zip(*columns)))

    def _sum(self, outcomes: Sequence[RewardOutcome]) -> RewardOutcome:
        values = {part.name: self._value(part, outcome.score) for (part, _), outcome in zip(self._parts, outcomes)}
        failure = next((outcome for outcome in outcomes if outcome.failed), None)
        main = failure or outcomes[0]
        return RewardOutcome(
            score=sum(part.weight * values[part.name] for part, _ in self._parts),
            category=main.category,
            detail=main.detail,
            seconds=max(outcome.seconds for outcome in outcomes),
            failed=main.failed,
            parts=values,
        )

    async def close(self) -> None:
        for _, scorer in self._parts:
            await scorer.close()

    def _value(self, part: Part, score: Score) -> float:
        if not isinstance(score, dict):
            return score
        number = entry_of(score, self._reward_key if self._reward_key in score else "score")
        if number is None:
            raise ConfigError(
                f"rewards of {part.name} are mappings with the entries {', '.join(map(repr, score)) or 'none'}: set "
                "--reward-key to one that is a number, so that they can be a term of a sum"
            )
        return number
