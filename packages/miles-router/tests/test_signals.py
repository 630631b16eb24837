"""A signal resumes its task at once, and behaves as a future does where a task expects one."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from miles.router.signals import Signal


@pytest.fixture
async def signal():
    return Signal(asyncio.get_running_loop())


async def call_back(function):
    """Call ``function`` as the loop calls a protocol: in no task."""
    done = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(lambda: done.set_result(function()))
    return await done


async def test_a_task_runs_on_inside_fire_and_in_its_own_context(signal):
    variable = contextvars.ContextVar("variable", default=0)
    seen = []

    async def wait():
        variable.set(1)
        await signal
        seen.append((variable.get(), asyncio.current_task()))
        await signal
        seen.append("again")

    def fire():
        signal.fire()
        return list(seen)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert await call_back(fire) == [(1, task)]
    assert (await call_back(fire))[1:] == ["again"]
    await task


@pytest.mark.parametrize("fire", [Signal.fire, Signal.fire_soon])
async def test_inside_a_task_the_other_one_runs_later(signal, fire):
    seen = []

    async def wait():
        await signal
        seen.append("on")

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    fire(signal)
    assert seen == []
    await task
    assert seen == ["on"]


async def test_nobody_hears_a_signal_for_which_nobody_waits(signal):
    signal.fire()
    signal.fire_soon()

    async def wait():
        await signal

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wait(), 0.01)


async def test_a_cancelled_wait_ends_and_the_next_one_works(signal):
    seen = []

    async def wait():
        try:
            await signal
        except asyncio.CancelledError:
            seen.append("cancelled")
        await signal

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel("why")
    await asyncio.sleep(0)
    assert seen == ["cancelled"]
    signal.fire_soon()
    await task


async def test_cancelling_after_the_signal_still_cancels(signal):
    async def wait():
        await signal

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    signal.fire_soon()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
