"""Scoring samples with a grader: at once where that is safe, else in a worker."""

from __future__ import annotations

import hashlib
import pickle
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from miles.core.protocols.reward import RewardOutcome
from miles.rewards.math.boxed import last_boxed
from miles.rewards.verdict import failed, outcome_of

if TYPE_CHECKING:
    from miles.core.types.sample import Sample
    from miles.rewards.context import Context
    from miles.rewards.grader import Grader

MAX_RESPONSE_CHARS = 8_000_000
_MEMO_SIZE = 4096


class Scorer(Protocol):
    """Scores samples one by one."""

    async def score(self, sample: Sample) -> RewardOutcome:
        """Grade; a failure is an outcome too.  Does not change ``sample``."""

    async def close(self) -> None:
        """Give connections back."""


class GraderScorer:
    """Scores with a text grader."""

    def __init__(self, grader: Grader, context: Context, *, boxed: bool = False) -> None:
        """``boxed`` grades the content of the last box instead of the whole response."""
        context.will_need((grader.grade.__module__, *grader.preload))
        self._grader = grader
        self._context = context
        self._boxed = boxed
        self._job = grader.job
        self._timeout_s = context.settings.timeout_s
        self._options: dict[str, Any] = {"strict_upstream": True} if context.settings.strict_upstream else {}
        self._memo: OrderedDict[bytes, RewardOutcome] = OrderedDict()

    async def score(self, sample: Sample) -> RewardOutcome:
        response = sample.response or ""
        if len(response) > MAX_RESPONSE_CHARS:
            return failed("too_long", f"{len(response)} characters", self._grader.failure_score)
        if self._boxed:
            response = last_boxed(response) or ""
        metadata = self._relevant(sample.metadata)
        if self._grader.quick is not None:
            started = time.perf_counter()
            verdict = self._grader.quick(response, sample.label, metadata)
            if verdict is not None:
                return outcome_of(verdict, time.perf_counter() - started, self._grader.failure_score)
        return await self._in_worker(response, sample.label, metadata)

    async def close(self) -> None:
        self._memo.clear()

    def _relevant(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        reads = self._grader.reads
        if not reads and reads is not None:
            return self._options
        kept = metadata if reads is None else {name: metadata[name] for name in reads if name in metadata}
        return {**kept, **self._options}

    async def _in_worker(self, response: str, label: Any, metadata: dict[str, Any]) -> RewardOutcome:
        try:
            arguments = pickle.dumps((response, label, metadata), protocol=5)
        except Exception as error:
            detail = f"label or metadata cannot be sent to a worker ({type(error).__name__}: {error})"
            return failed("error", detail[:300], self._grader.failure_score)
        key = hashlib.blake2b(arguments, digest_size=16).digest()
        if known := self._memo.get(key):
            self._memo.move_to_end(key)
            return known
        result = await self._context.pool.run_packed(self._job, arguments, timeout_s=self._timeout_s)
        if result.status != "ok":
            return failed(result.status, result.detail, self._grader.failure_score, result.seconds)
        outcome = outcome_of(result.value, result.seconds, self._grader.failure_score)
        self._remember(key, outcome)
        return outcome

    def _remember(self, key: bytes, outcome: RewardOutcome) -> None:
        self._memo[key] = outcome
        if len(self._memo) > _MEMO_SIZE:
            self._memo.popitem(last=False)
