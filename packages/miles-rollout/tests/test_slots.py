from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rollout.slots import Slots


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 6), wants=st.lists(st.integers(1, 8), max_size=12))
def test_never_more_than_there_are_and_everyone_gets_a_turn_in_order(total: int, wants: list[int]) -> None:
    async def run() -> None:
        slots, taken, order = Slots(total), 0, []

        async def work(number: int, count: int) -> None:
            nonlocal taken
            async with slots.take(count):
                order.append(number)
                taken += min(count, total)
                assert taken <= total
                await asyncio.sleep(0)
                taken -= min(count, total)

        await asyncio.gather(*(work(number, count) for number, count in enumerate(wants)))
        assert order == list(range(len(wants)))
        async with slots.take(total):
            pass

    asyncio.run(run())


async def test_a_cancelled_wait_gives_its_place_to_the_next() -> None:
    slots = Slots(2)
    entered = []

    async def work(name: str, count: int) -> None:
        async with slots.take(count):
            entered.append(name)

    async with slots.take(1):
        waiting = asyncio.create_task(work("large", 2))
        await asyncio.sleep(0)
        behind = asyncio.create_task(work("small", 1))
        await asyncio.sleep(0)
        assert entered == []
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await behind
    assert entered == ["small"]


async def test_a_slot_granted_to_a_cancelled_wait_is_not_lost() -> None:
    slots = Slots(1)

    async def work() -> None:
        async with slots.take():
            pass

    async with slots.take():
        waiting = asyncio.create_task(work())
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(work(), 60)
