"""Groups that are generated all the time, across rollouts and weight updates.

A stream keeps a number of groups in work, holds those that are finished until a rollout takes them, and knows how old
they are.  Its lock makes a moment at which every prompt is in exactly one place: the data source, the stream, or a
rollout that was trained on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from miles.core.errors import RolloutError
from miles.core.types.rollout import DynamicFilterOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.collect import GROUPS_PER_TURN, Shortfall, snapshot
from miles.rollout.group_task import failure
from miles.rollout.progress import Progress
from miles.rollout.staleness import oldest_version

_DONE = (Status.COMPLETED, Status.TRUNCATED)


@dataclass(frozen=True, slots=True)
class StreamSteps:
    """What a stream does with groups."""

    draw: Callable[[int], Awaitable[list[Group]]]
    """Get so many groups from the data source."""
    give_back: Callable[[list[Group]], Awaitable[None]]
    """Return groups to the data source."""
    run: Callable[[Group], Awaitable[Group]]
    """Generate and score a group."""
    judge: Callable[[Group], Awaitable[DynamicFilterOutput]]
    """The dynamic sampling filter."""
    version: Callable[[], int]
    """Weight version that the engines have now."""


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Groups in work, groups in work or waiting to be taken, and how old a group may be when it is taken.

    ``max_staleness`` None: any age.  ``retry_stale``: what is too old is generated again, else its prompt is dropped.
    ``max_groups``: how many groups may be dropped or fail for one rollout.
    """

    in_work: int
    outstanding: int
    max_groups: int
    max_staleness: int | None = None
    retry_stale: bool = True


@dataclass(slots=True)
class Taken:
    """What a rollout took, and what became of the rest since the last one."""

    groups: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    """Groups that the filter dropped or that failed."""
    drops: Counter[str] = field(default_factory=Counter)
    """Groups dropped by the filter, by its reason."""
    failures: Counter[str] = field(default_factory=Counter)
    """Groups that failed, by error."""
    stale: int = 0
    """Groups that were too old when they were to be taken."""


@dataclass(slots=True, eq=False)
class _Entry:
    """A group of the stream."""

    group: Group
    pristine: Group
    """The samples as they were drawn."""
    version: int
    """Of the weights when it was begun; an engine need not tell."""

    def oldest(self) -> int:
        return min(self.version, oldest_version(self.group, default=self.version))

    def order(self) -> tuple[int, int]:
        return self.oldest(), self.group[0].index or 0


class Stream:
    """Generates from the first ``take`` on, until ``close``.  All of it happens on one event loop."""

    def __init__(self, steps: StreamSteps, limits: StreamLimits, progress: Progress) -> None:
        self.progress = progress
        self._steps, self._limits = steps, limits
        self._running: dict[asyncio.Task[None], _Entry] = {}
        self._finished: list[_Entry] = []
        self._since = Taken()
        self._error: BaseException | None = None
        self._arrived, self._room_made = asyncio.Event(), asyncio.Event()
        self._drawing = asyncio.Lock()
        self._filler: asyncio.Task[None] | None = None

    @property
    def finished(self) -> list[Group]:
        """Groups that wait to be taken."""
        return [entry.group for entry in self._finished]

    @property
    def num_running(self) -> int:
        """Groups in work."""
        return len(self._running)

    async def take(self, count: int, version: int, tell: Callable[[int], None] = lambda taken: None) -> Taken:
        """``count`` finished groups, the oldest first, for training of weight ``version``; waits for what is missing.

        ``tell`` hears how many there are.  Raises RolloutError when too many groups fail or are dropped, and whatever
        stopped the stream.
        """
        if self._filler is None:
            self._filler = asyncio.create_task(self._keep_full())
        groups: list[Group] = []
        while len(groups) < count:
            self._arrived.clear()
            if self._error is not None:
                raise self._error
            groups += await self._oldest(count - len(groups), version)
            tell(len(groups))
            if len(groups) == count:
                break
            self._check_shortfall(len(groups), count)
            await self._arrived.wait()
        taken, self._since = self._since, Taken()
        taken.groups = groups
        self._room_made.set()
        return taken

    async def hold(self, save: Callable[[list[Group]], Awaitable[None]]) -> None:
        """Call ``save`` with every group of the stream, while none enters or leaves through the data source.

        A sample that is being generated is given as it was drawn.
        """
        async with self._drawing:
            # A group whose task has just ended is in both.
            entries = sorted({*self._running.values(), *self._finished}, key=lambda entry: entry.group[0].index or 0)
            await save([_resumable(entry) for entry in entries])

    async def close(self) -> None:
        """End the work.  Safe to call twice."""
        tasks = [*self._running, *([] if self._filler is None else [self._filler])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_full(self) -> None:
        try:
            while True:
                while (room := self._room()) > 0:
                    async with self._drawing:
                        groups = await self._steps.draw(room)
                        for number, group in enumerate(groups, 1):
                            self._submit(group)
                            if number % GROUPS_PER_TURN == 0:
                                await asyncio.sleep(0)
                    if not groups:
                        raise RolloutError("the data source has no more prompts")
                await self._room_made.wait()
                self._room_made.clear()
        except Exception as error:
            self._fail(error)

    def _room(self) -> int:
        """Groups to begin."""
        running = len(self._running)
        return min(self._limits.in_work - running, self._limits.outstanding - running - len(self._finished))

    def _submit(self, group: Group) -> None:
        entry = _Entry(group, [snapshot(sample) for sample in group], self._steps.version())
        task = asyncio.create_task(self._finish(entry))
        self._running[task] = entry
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)
        self._arrived.set()
        self._room_made.set()

    async def _finish(self, entry: _Entry) -> None:
        entry.group = await self._steps.run(entry.group)
        error = failure(entry.group)
        if error is not None:
            self._since.failures[error] += 1
            self._since.dropped.append(entry.group)
            return
        verdict = await self._steps.judge(entry.group)
        if verdict.keep:
            self._finished.append(entry)
        else:
            self._since.drops[verdict.reason or "no_reason"] += 1
            self._since.dropped.append(entry.group)

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._arrived.set()

    async def _oldest(self, count: int, version: int) -> list[Group]:
        """Up to ``count`` finished groups that are young enough; the others go their way."""
        bound = self._limits.max_staleness
        while stale := [entry for entry in self._finished if bound is not None and version - entry.oldest() > bound]:
            await self._discard(stale)
        self._finished.sort(key=_Entry.order)
        taken, self._finished = self._finished[:count], self._finished[count:]
        return [entry.group for entry in taken]

    async def _discard(self, stale: list[_Entry]) -> None:
        self._since.stale += len(stale)
        async with self._drawing:
            self._finished = [entry for entry in self._finished if entry not in stale]
            if self._limits.retry_stale:
                for sample in (sample for entry in stale for sample in entry.pristine):
                    sample.reset_for_retry()
                await self._steps.give_back([entry.pristine for entry in stale])
        self._room_made.set()

    def _check_shortfall(self, taken: int, count: int) -> None:
        since = self._since
        if since.stale > self._limits.max_groups:
            raise RolloutError(
                f"--max-weight-staleness {self._limits.max_staleness}: {since.stale} groups were older before {count} "
                "young enough ones were found. Either responses take longer than so many rollouts (raise the bound), "
                "or the engines do not say which weights they have"
            )
        tried = taken + since.drops.total() + since.failures.total()
        if since.failures.total() > count or tried - taken > self._limits.max_groups:
            raise RolloutError(
                Shortfall(count, taken, tried, self._limits.max_groups, since.drops, since.failures).text()
            )


def _resumable(entry: _Entry) -> Group:
    """The group with what is certain of it: finished samples, and the others as they were drawn."""
    if len(entry.group) != len(entry.pristine):  # several samples of one execution: it has to be made again as a whole
        return [snapshot(sample) for sample in entry.pristine]
    pairs = zip(entry.group, entry.pristine, strict=True)
    return [snapshot(sample if _is_scored(sample) else drawn) for sample, drawn in pairs]


def _is_scored(sample: Sample) -> bool:
    return sample.status in _DONE and sample.reward is not None
