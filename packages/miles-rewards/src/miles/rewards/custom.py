"""Functions of the user's own: coroutines on the event loop, plain functions in workers, both with a deadline."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from miles.core.protocols.reward import RewardOutcome
from miles.rewards.context import Context
from miles.rewards.pool import Job, Result
from miles.rewards.verdict import failed, outcome_of

if TYPE_CHECKING:
    from miles.core.types.sample import Sample

USER_TIMEOUT_S = 120.0

_PASSED_ON = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling ``function`` gives a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


class CustomScorer:
    """Scores with ``function(args, sample)``, or ``function(args, samples)`` for groups."""

    def __init__(self, function: Callable[..., Any], path: str, context: Context) -> None:
        """``path`` is where workers find ``function``: ``package.module:attribute``."""
        settings = context.settings
        self._context = context
        self._function = function
        self._path = path
        self._async = is_async(function)
        self._job = Job(path, bound=(settings.args,))
        self._timeout_s = settings.timeout_s or USER_TIMEOUT_S
        self._slots = asyncio.Semaphore(settings.concurrency)

    async def score(self, sample: Sample) -> RewardOutcome:
        result = await self._call(sample)
        if result.status != "ok":
            return failed(result.status, result.detail, 0.0, result.seconds)
        return outcome_of(result.value, result.seconds, 0.0)

    async def score_group(self, samples: Sequence[Sample]) -> list[RewardOutcome]:
        """One call for all; its failure is that of every sample."""
        result = await self._call(list(samples))
        if result.status != "ok":
            return [failed(result.status, result.detail, 0.0, result.seconds) for _ in samples]
        values = result.value if isinstance(result.value, (list, tuple)) else []
        if len(values) != len(samples):
            detail = f"{self._path} must return a list of {len(samples)} rewards, it returned {result.value!r}"
            return [failed("error", detail[:300], 0.0, result.seconds) for _ in samples]
        return [outcome_of(value, result.seconds, 0.0) for value in values]

    async def close(self) -> None:
        """Nothing to give back: the workers are the context's."""

    async def _call(self, argument: Any) -> Result:
        if self._async:
            return await self._await(argument)
        return await self._context.open_pool.run(self._job, argument, timeout_s=self._timeout_s)

    async def _await(self, argument: Any) -> Result:
        async with self._slots:
            started = time.perf_counter()
            try:
                async with asyncio.timeout(self._timeout_s) as deadline:
                    value = await self._function(self._context.settings.args, argument)
            except _PASSED_ON:
                raise
            except BaseException as error:
                seconds = time.perf_counter() - started
                if deadline.expired() and isinstance(error, TimeoutError):
                    return Result("timeout", detail=f"grading for more than {self._timeout_s:g} s", seconds=seconds)
                return Result("error", detail=f"{type(error).__name__}: {error}"[:300], seconds=seconds)
            return Result("ok", value, seconds=time.perf_counter() - started)
