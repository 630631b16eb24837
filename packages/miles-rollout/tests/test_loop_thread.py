from __future__ import annotations

import asyncio
import threading

import pytest

from miles.rollout.loop_thread import LoopThread


def test_work_runs_in_the_thread_and_its_result_and_errors_come_back() -> None:
    loop = LoopThread("named")

    async def name() -> str:
        return threading.current_thread().name

    async def fail() -> None:
        raise KeyError("x")

    assert loop.run(name()) == "named"
    assert loop.submit(name()).result(60) == "named"
    with pytest.raises(KeyError):
        loop.run(fail())
    loop.stop()


def test_waiting_for_work_may_end_before_the_work_which_is_then_cancelled() -> None:
    loop = LoopThread()
    cancelled = threading.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError):
        loop.run(hang(), deadline_s=0.05)
    assert cancelled.wait(60)
    loop.stop()


def test_stop_cancels_what_runs_and_may_be_repeated() -> None:
    loop = LoopThread()
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def start() -> asyncio.Task[None]:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        return task

    task = loop.run(start())
    loop.stop()
    loop.stop()
    assert cancelled.is_set()
    assert task.cancelled()
