"""A stream of groups over a fake engine: order, age, limits, failures, and what a checkpoint finds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from rollout_fakes import FakeSource, make_group

from miles.core.errors import RolloutError
from miles.core.types.rollout import DynamicFilterOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.progress import Progress
from miles.rollout.stream import Stream, StreamLimits, StreamSteps

DEADLINE_S = 10


class Engine:
    """Finishes a group when it is told to; all at once unless ``hold`` names some."""

    def __init__(self) -> None:
        self.version = 0
        self.held: dict[int, asyncio.Event] = {}
        self.begun: list[int] = []
        self.fails: Callable[[int], bool] = lambda number: False

    def hold(self, *numbers: int) -> None:
        self.held |= {number: asyncio.Event() for number in numbers}

    def release(self, *numbers: int) -> None:
        for number in numbers:
            self.held.pop(number).set()

    async def run(self, group: Group) -> Group:
        number = group[0].group_index or 0
        self.begun.append(number)
        began_with = self.version
        if number in self.held:
            await self.held[number].wait()
        await asyncio.sleep(0)
        for sample in group:
            if sample.status is not Status.COMPLETED:
                fill(sample, began_with)
            if self.fails(number):
                sample.status, sample.metadata = Status.FAILED, {"error": "lost"}
        return group


def fill(sample: Sample, version: int) -> None:
    sample.tokens, sample.response_length, sample.status = [1, 2, 3], 2, Status.COMPLETED
    sample.reward = 1.0
    sample.weight_versions, sample.token_weight_versions = [str(version)], [version] * 2


class Rig:
    """A stream with everything around it."""

    def __init__(self, judge: Callable[[Group], bool] = lambda group: True, **limits: Any) -> None:
        self.engine, self.source = Engine(), FakeSource()

        async def draw(count: int) -> list[Group]:
            return self.source.get_samples(count)

        async def give_back(groups: list[Group]) -> None:
            self.source.add_samples(groups)

        async def verdict(group: Group) -> DynamicFilterOutput:
            return DynamicFilterOutput(judge(group), "unwanted")

        steps = StreamSteps(draw, give_back, self.engine.run, verdict, lambda: self.engine.version)
        values = {"in_work": 2, "outstanding": 4, "max_groups": 8, **limits}
        self.stream = Stream(steps, StreamLimits(**values), Progress())

    async def take(self, count: int, version: int = 0) -> list[int]:
        async with asyncio.timeout(DEADLINE_S):
            self.taken = await self.stream.take(count, version)
        return numbers(self.taken.groups)

    async def settled(self) -> None:
        """Let everything happen that can."""
        for _ in range(50):
            await asyncio.sleep(0)


def numbers(groups: list[Group]) -> list[int]:
    return [group[0].group_index or 0 for group in groups]


async def test_generation_goes_on_when_a_rollout_was_taken() -> None:
    rig = Rig()
    assert await rig.take(2) == [0, 1]
    await rig.settled()
    assert numbers(rig.stream.finished) == [2, 3, 4, 5], "finished groups wait, as many as may"
    assert rig.stream.num_running == 0
    assert await rig.take(2) == [2, 3]
    await rig.stream.close()


async def test_no_more_groups_are_in_work_or_wait_than_the_limits_say() -> None:
    rig = Rig(in_work=3, outstanding=5)
    rig.engine.hold(*range(20))
    taking = asyncio.create_task(rig.take(1))
    await rig.settled()
    assert rig.engine.begun == [0, 1, 2]
    rig.engine.release(0, 1, 2)
    await taking
    await rig.settled()
    assert (rig.stream.num_running, len(rig.stream.finished)) == (3, 2)
    await rig.stream.close()


async def test_a_slow_group_is_not_waited_for_and_stays_in_work_over_weight_updates() -> None:
    rig = Rig(in_work=2)
    rig.engine.hold(0)
    assert await rig.take(2) == [1, 2]
    rig.engine.version = 1
    rig.engine.release(0)
    assert (await rig.take(2, version=1))[0] == 0, "the oldest is taken first"
    await rig.stream.close()


@pytest.mark.parametrize("retry", [True, False])
async def test_groups_that_are_too_old_are_made_again_or_dropped(retry: bool) -> None:
    rig = Rig(max_staleness=1, retry_stale=retry, in_work=1, outstanding=2)
    rig.engine.hold(0)
    taking = asyncio.create_task(rig.take(1))
    await rig.settled()
    rig.engine.version = 2
    rig.engine.release(0)
    await taking
    assert rig.taken.groups[0][0].token_weight_versions == [0, 0], "young enough for version 0"
    await rig.settled()
    for group in rig.stream.finished:
        for sample in group:
            fill(sample, 0)
    old = numbers(rig.stream.finished)
    taken = await rig.take(2, version=2)
    assert rig.taken.stale == len(old)
    assert all(sample.token_weight_versions == [2, 2] for group in rig.taken.groups for sample in group)
    assert (set(old) & set(taken) == set(old)) is retry
    await rig.stream.close()


async def test_dropped_and_failed_groups_are_counted_and_replaced() -> None:
    rig = Rig(judge=lambda group: group[0].group_index != 1)
    rig.engine.fails = lambda number: number == 0
    assert await rig.take(2) == [2, 3]
    assert (rig.taken.drops, rig.taken.failures) == ({"unwanted": 1}, {"lost": 1})
    assert numbers(rig.taken.dropped) == [0, 1]
    await rig.stream.close()


async def test_a_filter_that_drops_everything_ends_with_a_report() -> None:
    rig = Rig(judge=lambda group: False)
    with pytest.raises(RolloutError, match=r"(9|10) dropped by the dynamic filter: unwanted"):
        await rig.take(2)
    await rig.stream.close()


async def test_failing_groups_end_the_rollout_before_all_prompts_are_gone() -> None:
    rig = Rig()
    rig.engine.fails = lambda number: True
    with pytest.raises(RolloutError, match=r"failed: lost"):
        await rig.take(2)
    await rig.stream.close()


async def test_an_error_in_the_stream_reaches_who_waits_for_it() -> None:
    rig = Rig(judge=lambda group: 1 // 0 == 1)
    with pytest.raises(ZeroDivisionError):
        await rig.take(2)
    await rig.stream.close()


async def test_a_checkpoint_finds_every_group_once() -> None:
    rig = Rig()
    rig.engine.hold(2, 4)
    trained = await rig.take(2)
    await rig.settled()
    held: list[Group] = []

    async def save(groups: list[Group]) -> None:
        held.extend(groups)

    await rig.stream.hold(save)
    assert trained + numbers(held) == list(range(rig.source.next_group))
    by_number = {group[0].group_index: group for group in held}
    assert all(sample.status is Status.PENDING and not sample.tokens for sample in by_number[2])
    assert all(sample.status is Status.COMPLETED and sample.reward == 1.0 for sample in by_number[3])
    await rig.stream.close()


async def test_samples_of_a_running_group_that_are_finished_already_are_kept() -> None:
    rig = Rig(in_work=1, outstanding=1)
    rig.engine.hold(0)
    rig.source.add_samples([make_group(0)])
    taking = asyncio.create_task(rig.take(1))
    await rig.settled()
    (entry,) = rig.stream._running.values()
    fill(entry.group[1], 0)
    held: list[Group] = []

    async def save(groups: list[Group]) -> None:
        held.extend(groups)

    await rig.stream.hold(save)
    assert [sample.status for sample in held[0]] == [Status.PENDING, Status.COMPLETED]
    rig.engine.release(0)
    await taking
    await rig.stream.close()


async def test_groups_that_never_get_young_enough_end_the_rollout() -> None:
    rig = Rig(max_staleness=1)
    with pytest.raises(RolloutError, match="the engines do not say which weights they have"):
        await rig.take(2, version=5)
    await rig.stream.close()
