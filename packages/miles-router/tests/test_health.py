"""Health checks begin and end when they are told to."""

from __future__ import annotations

import asyncio

import pytest

from miles.router.health import HealthMonitor
from miles.router.settings import Settings
from miles.router.workers import Fleet


@pytest.mark.parametrize("turns", range(6))
async def test_checks_end_even_in_the_moment_they_are_woken(make_worker, until, turns):
    worker = await make_worker()
    fleet = Fleet(failure_threshold=3, readmission_checks=2)
    monitor = HealthMonitor(fleet, Settings(health_check_interval_s=600), on_failure=pytest.fail)
    known = fleet.add(worker.url)
    monitor.watch(known)
    await until(lambda: known.state == "healthy" and not known.wake.is_set())
    known.wake.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    await asyncio.wait_for(monitor.stop(), 20)
