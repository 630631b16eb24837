"""Pools inside Ray actors, which are processes that Ray starts and kills."""

import os
import time

import pytest

pytestmark = pytest.mark.e2e
ray = pytest.importorskip("ray")

from miles.rewards.pool import Job, Pool  # noqa: E402

DEADLINE_S = 120.0


def grading_actor():
    """A class that Ray sends by value: its processes do not find this module."""
    job = Job("miles.rewards.types.math:grade", timeout_s=DEADLINE_S)
    items = [(rf"\boxed{{{number}}}", "7", {}) for number in range(5, 9)]

    class Grading:
        def __init__(self):
            self.pool = Pool(2)

        def pids(self):
            return self.pool.pids

        async def run_many(self):
            return [result.value[0] for result in await self.pool.run_many(job, items)]

    return ray.remote(Grading).remote()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_actor_has_workers_that_end_when_it_is_killed():
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        actor = grading_actor()
        assert ray.get(actor.run_many.remote(), timeout=DEADLINE_S) == [0.0, 0.0, 1.0, 0.0]
        pids = ray.get(actor.pids.remote(), timeout=DEADLINE_S)
        ray.kill(actor)
        deadline = time.monotonic() + DEADLINE_S
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(pids) == 3
        assert not any(map(alive, pids))
    finally:
        ray.shutdown()
