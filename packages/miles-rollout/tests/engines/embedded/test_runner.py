from __future__ import annotations

import threading
from typing import Any

import pytest

from miles.core.errors import EngineError
from miles.rollout.engines.embedded.runner import Runner


class IdleScheduler:
    idle = True


@pytest.fixture
def failed() -> threading.Event:
    return threading.Event()


@pytest.fixture
def runner(failed: threading.Event) -> Any:
    scheduler: Any = IdleScheduler()
    runner = Runner(scheduler, failed.set)
    runner.start()
    yield runner
    runner.stop()


def test_a_refused_command_raises_where_it_was_asked_for_and_the_next_one_runs(runner: Runner) -> None:
    def refuse(_: object) -> None:
        raise EngineError("busy")

    with pytest.raises(EngineError, match="busy"):
        runner.call(refuse).result(5)
    assert runner.call(lambda _: 7).result(5) == 7


def test_a_command_that_breaks_the_engine_is_answered_and_so_is_every_later_one(
    runner: Runner, failed: threading.Event
) -> None:
    with pytest.raises(EngineError, match="the engine failed: ZeroDivisionError"):
        runner.call(lambda _: 1 / 0).result(5)
    assert failed.wait(5)
    with pytest.raises(EngineError, match="the engine failed"):
        runner.call(lambda _: 7).result(5)
