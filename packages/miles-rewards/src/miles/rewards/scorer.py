"""Scoring samples with a grader: at once where that is safe, else in a worker."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from miles.core.protocols.reward import RewardOutcome
from miles.rewards.math.boxed import last_boxed
from miles.rewards.pool.calls import single_block
from miles.rewards.verdict import failed, outcome_of

if TYPE_CHECKING:
    from miles.core.types.sample import Sample
    from miles.rewards.context import Context
    from miles.rewards.grader import Grader
    from miles.rewards.pool import Result

MAX_RESPONSE_CHARS = 8_000_000
_AT_ONCE_CHARS = 100_000
"""Longer responses go to workers: reading one may take the event loop's time by the tenth of a second."""
_MEMO_SIZE = 4096


ScoreMany = Callable[[Sequence["Sample"]], Awaitable[list[RewardOutcome]]]


class Scorer(Protocol):
    """Scores samples one by one."""

    async def score(self, sample: Sample) -> RewardOutcome:
        """Grade; a failure is an outcome too.  Does not change ``sample``."""

    async def close(self) -> None:
        """Give connections back."""


async def score_all(scorer: Scorer, samples: Sequence[Sample]) -> list[RewardOutcome]:
    """Outcomes in order, by ``score_many`` where ``scorer`` has that."""
    score_many: ScoreMany | None = getattr(scorer, "score_many", None)
    if score_many is not None:
        return await score_many(samples)
    return await asyncio.gather(*map(scorer.score, samples))


class GraderScorer:
    """Scores with a text grader."""

    def __init__(self, grader: Grader, context: Context, *, boxed: bool = False) -> None:
        """``boxed`` grades the content of the last box instead of the whole response."""
        context.will_need((grader.grade.__module__, *grader.preload))
        self._grader = grader
        self._quick = grader.quick
        self._context = context
        self._boxed = boxed
        self._reads_nothing = grader.reads == ()
        self._job = grader.boxed_job if boxed else grader.job
        self._timeout_s = context.settings.timeout_s
        self._options: dict[str, Any] = {"strict_upstream": True} if context.settings.strict_upstream else {}
        self._memo: OrderedDict[bytes, RewardOutcome] = OrderedDict()

    async def score(self, sample: Sample) -> RewardOutcome:
        return self._at_once(sample) or (await self._in_workers([sample]))[0]

    async def score_many(self, samples: Sequence[Sample]) -> list[RewardOutcome]:
        """Grade all, in order: the easy ones at once, the others with one message to the workers."""
        outcomes = list(map(self._at_once, samples))
        others = [sample for sample, outcome in zip(samples, outcomes) if outcome is None]
        if not others:
            return [outcome for outcome in outcomes if outcome is not None]
        graded = iter(await self._in_workers(others))
        return [outcome or next(graded) for outcome in outcomes]

    async def close(self) -> None:
        self._memo.clear()

    def _at_once(self, sample: Sample) -> RewardOutcome | None:
        """The outcome, if it takes no worker."""
        response, quick = sample.response or "", self._quick
        if quick is None or len(response) > _AT_ONCE_CHARS:
            if len(response) <= MAX_RESPONSE_CHARS:
                return None
            return failed("too_long", f"{len(response)} characters", self._grader.failure_score)
        if self._boxed:
            response = last_boxed(response) or ""
        metadata = self._options if self._reads_nothing else self._relevant(sample.metadata)
        started = time.perf_counter()
        try:
            verdict = quick(response, sample.label, metadata)
        except Exception as error:  # a label or metadata of a kind that the grader cannot read: as in a worker
            detail, seconds = f"{type(error).__name__}: {error}"[:300], time.perf_counter() - started
            return failed("error", detail, self._grader.failure_score, seconds)
        if verdict is None:
            return None
        return outcome_of(verdict, time.perf_counter() - started, self._grader.failure_score)

    def _relevant(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        if self._reads_nothing:
            return self._options
        reads = self._grader.reads
        kept = metadata if reads is None else {name: metadata[name] for name in reads if name in metadata}
        return {**kept, **self._options}

    async def _in_workers(self, samples: Sequence[Sample]) -> list[RewardOutcome]:
        packed = [self._pack(sample) for sample in samples]
        outcomes = {call: self._recall(call) for call in packed if isinstance(call, bytes)}
        new = [call for call, outcome in outcomes.items() if outcome is None]  # equal ones are graded once
        if new:
            results = await self._context.pool.run_blocks(self._job, new, timeout_s=self._timeout_s)
            outcomes |= {call: self._outcome(call, result) for call, result in zip(new, results, strict=True)}
        graded = (outcomes[call] if isinstance(call, bytes) else call for call in packed)
        return [outcome for outcome in graded if outcome is not None]

    def _pack(self, sample: Sample) -> bytes | RewardOutcome:
        """What a worker gets, or why it gets nothing."""
        try:
            return single_block((sample.response or "", sample.label, self._relevant(sample.metadata)))
        except Exception as error:
            detail = f"label or metadata cannot be sent to a worker ({type(error).__name__}: {error})"
            return failed("error", detail[:300], self._grader.failure_score)

    def _outcome(self, call: bytes, result: Result) -> RewardOutcome:
        if result.status != "ok":
            return failed(result.status, result.detail, self._grader.failure_score, result.seconds)
        outcome = outcome_of(result.value, result.seconds, self._grader.failure_score)
        self._memo[_key(call)] = outcome
        if len(self._memo) > _MEMO_SIZE:
            self._memo.popitem(last=False)
        return outcome

    def _recall(self, call: bytes) -> RewardOutcome | None:
        """The outcome of an equal grading before."""
        known = self._memo.get(_key(call))
        if known is not None:
            self._memo.move_to_end(_key(call))
        return known


def _key(call: bytes) -> bytes:
    return hashlib.blake2b(call, digest_size=16).digest()
