"""The pool under the worst that models write: what a run relies on, with the numbers it relies on."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from miles.rewards.pool import Job, Pool
from miles.rewards.types import math as types_math

CASES = Path(__file__).parent / "cases"
MATH = Job("miles.rewards.types.math:grade", timeout_s=60.0)
HANG = Job("hostile:hang_in_c")
ATTEMPTS = 8
"""A busy machine makes times longer, never shorter: one good round is proof."""


def ordinary_items(count):
    cases = [json.loads(line) for line in (CASES / "math_recorded.jsonl").read_text().splitlines()]
    return [(case["response"], case["label"], {}) for case in (cases * (count // len(cases) + 1))[:count]]


async def watch(stop: asyncio.Event) -> float:
    """The longest time for which the event loop was late."""
    worst = 0.0
    while not stop.is_set():
        started = time.perf_counter()
        await asyncio.sleep(0.01)
        worst = max(worst, time.perf_counter() - started - 0.01)
    return worst


async def grade_all(pool: Pool, items, num_hangs: int):
    """Results of the items, seconds, and the most that the event loop was late."""
    stop = asyncio.Event()
    watcher = asyncio.ensure_future(watch(stop))
    started = time.perf_counter()
    hangs = {position * len(items) // num_hangs for position in range(num_hangs)}
    calls = []
    for position, item in enumerate(items):
        calls += [pool.run(HANG, 1)] if position in hangs else []
        calls.append(pool.run(MATH, *item))
    results = await asyncio.gather(*calls)
    elapsed = time.perf_counter() - started
    stop.set()
    hung = {position + before for before, position in enumerate(sorted(hangs))}
    assert all(results[place].status == "timeout" for place in hung)
    return [result for place, result in enumerate(results) if place not in hung], elapsed, await watcher


@pytest.mark.slow
async def test_nine_hangs_cost_nine_verdicts_and_little_more_than_their_own_time():
    items, num_hangs, limit_s, num_workers = ordinary_items(2000), 9, 2.0, 2
    async with Pool(num_workers, timeout_s=limit_s, preload=["miles.rewards.types.math"]) as pool:
        plain, plain_s, _ = await grade_all(pool, items, 0)
        for attempt in range(1, ATTEMPTS + 1):
            results, elapsed, late = await grade_all(pool, items, num_hangs)
            assert [result.value for result in results] == [result.value for result in plain]
            assert pool.num_replaced == attempt * num_hangs
            assert len(pool.pids) == num_workers + 1
            if elapsed <= 1.3 * num_hangs * limit_s / num_workers + plain_s and late < 0.1:
                return
    pytest.fail(f"{elapsed:.1f} s, {plain_s:.1f} s without hangs; the event loop was late by {late:.3f} s")


@pytest.fixture(scope="module")
def pool():
    with Pool(2, timeout_s=60.0, preload=["miles.rewards.types.math"]) as pool:
        yield pool


def test_hard_texts_cost_little_and_leave_the_pool_well():
    cases = [json.loads(line) for line in (CASES / "pathological.jsonl").read_text().splitlines()]
    items = [(case["rm_type"], case.get("response") or "", case["label"], case.get("metadata") or {}) for case in cases]
    with Pool(2, timeout_s=60.0) as pool:
        costs = pool.map(Job("hostile:cost_of"), items)
        pids = pool.pids
        ordinary = pool.map(MATH, ordinary_items(100))
        assert (pool.pids, len(pids), pool.num_replaced) == (pids, 3, 0)
    assert {result.status for result in costs} == {"ok"}
    assert max(cpu_s for cpu_s, _ in (result.value for result in costs)) < 1.0
    assert max(peak_bytes for _, peak_bytes in (result.value for result in costs)) < 1 << 30
    right = [types_math.grade(*item)[0] for item in ordinary_items(100)]
    assert [result.value[0] for result in ordinary] == right
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("function", ["die", "segfault", "eat_memory", "recurse", "fail", "leave", "huge_answer"])
async def test_the_next_hundred_verdicts_are_right(pool, function):
    items = ordinary_items(100)
    results = await asyncio.gather(pool.run(Job(f"hostile:{function}"), 1), *(pool.run(MATH, *item) for item in items))
    assert results[0].status in ("crash", "error", "timeout")
    assert {result.status for result in results[1:]} == {"ok"}
    assert sum(result.value[0] for result in results[1:]) > 30
