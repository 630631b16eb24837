"""Collecting the groups of one rollout: waves of over-sampling, dynamic filtering, an end to the surplus.

Without partial rollout a batch is the first groups, *in the order they were drawn*, that the filter keeps; later ones
are given back untouched.  So a batch depends on seeds only, not on which response was ready first, and short responses
are not preferred.  With partial rollout a batch is the groups that were ready first, and unfinished ones are continued
later.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from copy import copy
from dataclasses import dataclass, field

from miles.core.errors import RolloutError
from miles.core.types.rollout import DynamicFilterOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.group_task import failure

ABORT_DEADLINE_S = 60.0
"""Time for aborted groups to end; what still runs then is cancelled."""
GROUPS_PER_TURN = 64
"""Groups begun before others get their turn on the event loop: thousands at once would hold it for seconds."""
_ABORT_AGAIN_S = 1.0
"""A request that was on its way while the engine aborted must be aborted again."""
_REASON_CHARS = 400


@dataclass(frozen=True, slots=True)
class Steps:
    """What a collector does with groups."""

    draw: Callable[[int], Awaitable[list[Group]]]
    """Get so many groups from the data source."""
    run: Callable[[Group], Awaitable[Group]]
    """Generate and score a group."""
    judge: Callable[[Group], Awaitable[DynamicFilterOutput]]
    """The dynamic sampling filter."""
    abort: Callable[[], Awaitable[None]]
    """Make every running group end soon.  Called again while some do not."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many groups to collect (``target``), to draw at a time (``wave``), and to try at most (``max_groups``)."""

    target: int
    wave: int
    max_groups: int


@dataclass(slots=True)
class Collected:
    """The outcome of a collection."""

    groups: list[Group] = field(default_factory=list)
    """Kept groups."""
    dropped: list[Group] = field(default_factory=list)
    """Groups that the filter dropped or that failed."""
    surplus: list[Group] = field(default_factory=list)
    """Groups for a later rollout."""
    drops: Counter[str] = field(default_factory=Counter)
    """Groups dropped by the filter, by its reason."""
    failures: Counter[str] = field(default_factory=Counter)
    """Groups that failed, by error."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A finished group.  ``error``: why it failed."""

    group: Group
    verdict: DynamicFilterOutput
    error: str | None = None


@dataclass(slots=True)
class _Slot:
    """A drawn group; ``outcome`` once it was taken note of."""

    group: Group
    pristine: Group
    """The samples as they were drawn."""
    task: asyncio.Task[_Outcome]
    outcome: _Outcome | None = None


class Collector:
    """One collection.  ``partial``: groups count in the order they get ready, and unfinished ones keep their tokens."""

    def __init__(self, steps: Steps, limits: Limits, *, partial: bool = False, may_drop: bool = True) -> None:
        self._steps, self._limits, self._partial = steps, limits, partial
        self._may_leave_surplus = may_drop or limits.wave > limits.target
        self._slots: list[_Slot] = []
        self._ready: asyncio.Queue[_Slot] = asyncio.Queue()
        self._num_dropped = 0
        self._cursor = 0
        """Slots before it have counted (in drawing order)."""
        self._result = Collected()

    async def collect(self) -> Collected:
        """Exactly ``target`` kept groups; RolloutError when too many groups fail or are dropped."""
        try:
            while len(self._result.groups) < self._limits.target:
                await self._draw_waves()
                await self._take_ready()
            await self._end_surplus()
        finally:
            await self._cancel()
        return self._result

    async def _draw_waves(self) -> None:
        limits = self._limits
        while len(self._slots) - self._num_dropped < limits.target:
            room = limits.max_groups - len(self._slots)
            if room <= 0:
                return
            groups = await self._steps.draw(min(limits.wave, room))
            if not groups:
                raise RolloutError(f"the data source has no more prompts: {self._report()}")
            # Of the first wave every group counts unless some are too many; a later one replaces a few that were lost.
            may_be_left = self._may_leave_surplus or bool(self._slots)
            for number, group in enumerate(groups, 1):
                self._submit(group, keeps_pristine=may_be_left and not self._partial)
                if number % GROUPS_PER_TURN == 0:
                    await asyncio.sleep(0)

    def _submit(self, group: Group, *, keeps_pristine: bool) -> None:
        pristine = [snapshot(sample) for sample in group] if keeps_pristine else group
        slot = _Slot(group, pristine, asyncio.create_task(self._finish(group)))
        slot.task.add_done_callback(lambda _: self._ready.put_nowait(slot))
        self._slots.append(slot)

    async def _finish(self, group: Group) -> _Outcome:
        group = await self._steps.run(group)
        error = failure(group)
        if error is not None:
            return _Outcome(group, DynamicFilterOutput(False), error)
        if _is_cut(group):  # judged when it is complete, in a later rollout
            return _Outcome(group, DynamicFilterOutput(True))
        return _Outcome(group, await self._steps.judge(group))

    async def _take_ready(self) -> None:
        """Take note of every group that is ready; wait for one."""
        if self._cursor == len(self._slots):
            raise RolloutError(self._report())
        self._take(await self._ready.get())
        while not self._ready.empty():
            self._take(self._ready.get_nowait())
        if not self._partial:
            self._count_in_order()

    def _take(self, slot: _Slot) -> None:
        slot.outcome = slot.task.result()
        self._num_dropped += not slot.outcome.verdict
        if self._partial:
            self._cursor += 1
            self._count(slot.outcome)

    def _count_in_order(self) -> None:
        while self._cursor < len(self._slots) and len(self._result.groups) < self._limits.target:
            outcome = self._slots[self._cursor].outcome
            if outcome is None:
                return
            self._cursor += 1
            self._count(outcome)

    def _count(self, outcome: _Outcome) -> None:
        result = self._result
        if outcome.verdict.keep:
            complete = len(result.groups) == self._limits.target
            (result.surplus if complete else result.groups).append(outcome.group)
            return
        result.dropped.append(outcome.group)
        if outcome.error is None:
            result.drops[outcome.verdict.reason or "no_reason"] += 1
            return
        result.failures[outcome.error] += 1
        if result.failures.total() > self._limits.target:
            raise RolloutError(self._report())

    async def _end_surplus(self) -> None:
        """Stop what still runs and gather what is left for a later rollout."""
        running = {slot.task for slot in self._slots if not slot.task.done()}
        deadline = time.monotonic() + ABORT_DEADLINE_S
        while running and time.monotonic() < deadline:
            await self._steps.abort()
            _, running = await asyncio.wait(running, timeout=_ABORT_AGAIN_S)
        if self._partial:
            self._keep_unfinished(running)
        else:
            self._result.surplus = [slot.pristine for slot in self._slots[self._cursor :]]

    def _keep_unfinished(self, running: set[asyncio.Task[_Outcome]]) -> None:
        for slot in self._slots:
            if slot.outcome is not None:
                continue
            if slot.task in running:
                for sample in slot.group:
                    sample.reset_for_retry()
                self._result.surplus.append(slot.group)
                continue
            outcome = slot.task.result()
            if _is_cut(outcome.group) and outcome.error is None:
                self._result.surplus.append(outcome.group)
            else:
                self._count(outcome)

    async def _cancel(self) -> None:
        tasks = [slot.task for slot in self._slots]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _report(self) -> str:
        """Why the rollout cannot be completed."""
        result, limits = self._result, self._limits
        kept = len(result.groups)
        return Shortfall(limits.target, kept, self._cursor, limits.max_groups, result.drops, result.failures).text()


def _is_cut(group: Group) -> bool:
    return any(sample.status is Status.ABORTED for sample in group)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A rollout that needs ``target`` groups, and has ``kept`` of the ``tried``."""

    target: int
    kept: int
    tried: int
    max_groups: int
    drops: Counter[str]
    failures: Counter[str]

    def text(self) -> str:
        """What happened to the others, and what to do."""
        lines = [
            f"the rollout needs {self.target} groups, but only {self.kept} of the {self.tried} that were tried can be "
            "trained on."
        ]
        lines += [f"  {count} dropped by the dynamic filter: {reason}" for reason, count in self.drops.most_common()]
        lines += [f"  {count} failed: {error[:_REASON_CHARS]}" for error, count in self.failures.most_common(3)]
        if self.drops.total():
            lines.append(
                f"At most {self.max_groups} groups are tried (--dynamic-sampling-max-rounds). Look at the rewards: "
                "prompts that are always or never solved teach nothing, so take easier or harder ones."
            )
        return "\n".join(lines)


_CONTAINERS = (
    "tokens",
    "loss_mask",
    "rollout_log_probs",
    "teacher_log_probs",
    "weight_versions",
    "token_weight_versions",
    "metadata",
    "train_metadata",
    "spec_info",
    "prefix_cache_info",
)


def snapshot(sample: Sample) -> Sample:
    """A copy that changes of the original, in place or not, do not reach."""
    taken = copy(sample)
    for name in _CONTAINERS:
        setattr(taken, name, copy(getattr(sample, name)))
    return taken
