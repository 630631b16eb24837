from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from miles.core.driver.timings import Timings


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_phases_add_up_and_begin_anew() -> None:
    timings = Timings()
    with timings.phase("train"):
        pass
    timings.add("train", 2.0)
    timings.replace({"send": 1.0})
    timings.replace({"send": 3.0})
    found = timings.take()
    assert found.keys() == {"train", "send"}
    assert 2.0 <= found["train"] < 62.0
    assert found["send"] == 3.0
    assert timings.take() == {}


def test_a_phase_that_fails_is_not_counted() -> None:
    timings = Timings()
    with pytest.raises(KeyError), timings.phase("train"):
        raise KeyError
    assert timings.take() == {}


def test_nothing_is_lost_between_threads(hasty_threads: None) -> None:
    timings = Timings()
    found = []

    def count(_: int) -> None:
        for _ in range(300):
            timings.add("wait", 1.0)

    with ThreadPoolExecutor(5) as pool:
        counting = pool.map(count, range(4))
        for _ in range(300):
            found.append(timings.take().get("wait", 0.0))
        list(counting)
    assert sum(found) + timings.take().get("wait", 0.0) == 1200.0
