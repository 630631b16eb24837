from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import FakeSource

from miles.core.errors import RolloutError
from miles.core.types.rollout import DynamicFilterOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.collect import Collected, Collector, Limits, Steps, snapshot


class World:
    """Groups take ``delay(number)`` turns of the loop; ``drops`` and ``fails`` name groups by number."""

    def __init__(
        self,
        drops: set[int] | None = None,
        fails: set[int] | None = None,
        stuck: set[int] | None = None,
        shuffle: int | None = None,
    ) -> None:
        self.source = FakeSource()
        self.drops, self.fails, self.stuck = drops or set(), fails or set(), stuck or set()
        self.aborted = asyncio.Event()
        self.num_aborts = 0
        self.random = None if shuffle is None else random.Random(shuffle)

    async def draw(self, count: int) -> list[Group]:
        return self.source.get_samples(count)

    async def run(self, group: Group) -> Group:
        number = group[0].group_index
        for _ in range(0 if self.random is None else self.random.randrange(20)):
            await asyncio.sleep(0)
        if number in self.stuck:
            await self.aborted.wait()
        for sample in group:
            if number in self.stuck:
                sample.tokens, sample.response_length, sample.status = [1, 2], 1, Status.ABORTED
            elif number in self.fails:
                sample.status, sample.metadata["error"] = Status.FAILED, "engine on fire"
            else:
                sample.tokens, sample.response_length, sample.status = [1, 2, 3], 2, Status.COMPLETED
                sample.reward = 1.0
                sample.metadata["touched"] = True
        return group

    async def judge(self, group: Group) -> DynamicFilterOutput:
        assert all(sample.reward is not None for sample in group), "filters look at rewards"
        keep = group[0].group_index not in self.drops
        return DynamicFilterOutput(keep, None if keep else "boring")

    async def abort(self) -> None:
        self.num_aborts += 1
        self.aborted.set()

    async def collect(self, target: int, wave: int, *, max_groups: int = 100, partial: bool = False) -> Collected:
        steps = Steps(self.draw, self.run, self.judge, self.abort)
        return await Collector(steps, Limits(target, wave, max_groups), partial=partial).collect()


def numbers(groups: list[Group]) -> list[Any]:
    return [group[0].group_index for group in groups]


async def test_without_filter_every_group_is_used() -> None:
    world = World()
    collected = await world.collect(3, 3)
    assert numbers(collected.groups) == [0, 1, 2]
    assert collected.surplus == []
    assert world.num_aborts == 0


@pytest.mark.parametrize("may_drop", [True, False])
async def test_groups_drawn_in_place_of_a_failed_one_are_given_back_untouched(may_drop: bool) -> None:
    world = World(fails={1}, stuck={4})
    steps = Steps(world.draw, world.run, world.judge, world.abort)
    collected = await Collector(steps, Limits(3, 3, 100), may_drop=may_drop).collect()
    assert numbers(collected.groups) == [0, 2, 3]
    assert numbers(collected.surplus) == [4, 5]
    for sample in (sample for group in collected.surplus for sample in group):
        assert (sample.status, sample.tokens) == (Status.PENDING, [])
        assert "touched" not in sample.metadata


async def test_dropped_groups_are_replaced_and_counted() -> None:
    collected = await World(drops={1, 4}).collect(3, 2)
    assert numbers(collected.groups) == [0, 2, 3]
    assert numbers(collected.dropped) == [1]
    assert collected.drops == {"boring": 1}


async def test_surplus_groups_come_back_as_they_were_drawn() -> None:
    world = World(stuck={5})
    collected = await world.collect(3, 6)
    assert numbers(collected.groups) == [0, 1, 2]
    assert collected.surplus == FakeSource().get_samples(6)[3:]
    assert world.num_aborts >= 1


@settings(max_examples=60, deadline=None)
@given(
    drops=st.sets(st.integers(0, 30), max_size=20),
    wave=st.integers(4, 12),
    order=st.integers(0, 10**6),
)
def test_a_batch_does_not_depend_on_which_group_is_ready_first(drops: set[int], wave: int, order: int) -> None:
    async def rollouts(world: World) -> list[Any]:
        seen = []
        for _ in range(3):
            collected = await world.collect(4, wave)
            world.source.add_samples(collected.surplus)
            seen.append((numbers(collected.groups), numbers(collected.dropped), collected.drops))
        return seen

    in_order = asyncio.run(rollouts(World(drops)))
    kept = [number for number in range(60) if number not in drops][:12]
    assert [number for groups, _, _ in in_order for number in groups] == kept
    assert asyncio.run(rollouts(World(drops, shuffle=order))) == in_order


async def test_when_everything_is_dropped_the_rollout_ends_with_the_reasons() -> None:
    with pytest.raises(RolloutError) as caught:
        await World(drops=set(range(100))).collect(4, 4, max_groups=12)
    assert "needs 4 groups, but only 0 of the 12 that were tried" in str(caught.value)
    assert "12 dropped by the dynamic filter: boring" in str(caught.value)
    assert "--dynamic-sampling-max-rounds" in str(caught.value)


async def test_failed_groups_are_replaced_and_counted() -> None:
    collected = await World(fails={0, 2}).collect(3, 3)
    assert numbers(collected.groups) == [1, 3, 4]
    assert collected.failures == {"engine on fire": 2}
    assert collected.drops == {}


async def test_when_more_groups_fail_than_are_needed_the_rollout_ends() -> None:
    with pytest.raises(RolloutError, match="4 failed: engine on fire"):
        await World(fails=set(range(100))).collect(3, 3)


async def test_a_source_that_runs_dry_ends_the_rollout() -> None:
    world = World()
    world.source.get_samples = lambda num_samples: []  # type: ignore[method-assign]
    with pytest.raises(RolloutError, match="the data source has no more prompts"):
        await world.collect(3, 3)


async def test_an_error_of_a_step_ends_the_rollout_and_its_tasks() -> None:
    world = World(stuck={0, 1})
    running = []

    async def judge(group: Group) -> DynamicFilterOutput:
        running.extend(task for task in asyncio.all_tasks() if task is not asyncio.current_task())
        raise ZeroDivisionError("in the filter")

    world.judge = judge  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        await world.collect(3, 3)
    await asyncio.sleep(0)
    current = asyncio.current_task()
    assert all(task.done() for task in running if task is not current)


async def test_partial_rollout_takes_what_is_ready_and_keeps_the_rest() -> None:
    world = World(stuck={0, 1})
    collected = await world.collect(2, 4, partial=True)
    assert sorted(numbers(collected.groups)) == [2, 3]
    assert sorted(numbers(collected.surplus)) == [0, 1]
    assert all(sample.response_length == 1 for group in collected.surplus for sample in group)


async def test_partial_rollout_keeps_complete_groups_too() -> None:
    collected = await World().collect(2, 5, partial=True)
    assert len(collected.groups) == 2
    assert sorted(numbers(collected.groups + collected.surplus)) == [0, 1, 2, 3, 4]
    assert all(sample.status is Status.COMPLETED for group in collected.surplus for sample in group)


def test_a_snapshot_is_not_reached_by_changes() -> None:
    sample = Sample(tokens=[1], metadata={"a": 1}, loss_mask=[1])
    taken = snapshot(sample)
    sample.tokens.append(2)
    sample.metadata["a"] = 2
    sample.prefix_cache_info.cached_tokens = 5
    assert (taken.tokens, taken.metadata, taken.prefix_cache_info.cached_tokens) == ([1], {"a": 1}, 0)
