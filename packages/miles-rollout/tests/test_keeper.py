"""The keeper of one engine's place, with fake processes and real heartbeats."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from rollout_fakes import FakeEngine, FakeServer

from miles.core.errors import EngineError
from miles.rollout import keeper as keeper_module
from miles.rollout.keeper import EngineKeeper, EngineState, Patience

PATIENCE = Patience(interval_s=0.05, timeout_s=30, max_restarts=2)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "_POLL_S", 0.01)
    monkeypatch.setattr(keeper_module, "_FIRST_BACKOFF_S", 0.01)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


class Place:
    """A kept place, and what its keeper did."""

    def __init__(self, server: FakeServer, patience: Patience = PATIENCE) -> None:
        self.server = server
        self.started: list[FakeEngine] = []
        self.lost: list[str] = []
        self.num_ready = 0
        self.stillborn = 0
        self.keeper = EngineKeeper(
            FakeEngine(server),
            find_room=self.find_room,
            patience=patience,
            on_lost=self.lost.append,
            on_ready=self.ready,
        )
        self.first = self.keeper.engine
        self.keeper.watch()

    def find_room(self) -> Callable[[], FakeEngine]:
        return self.start

    def start(self) -> FakeEngine:
        engine = FakeEngine(self.server)
        if self.stillborn:
            self.stillborn -= 1
            engine.dead = True
        self.started.append(engine)
        return engine

    def ready(self, keeper: EngineKeeper) -> None:
        self.num_ready += 1

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def place(server: FakeServer) -> Iterator[Place]:
    place = Place(server)
    yield place
    place.keeper.stop()


def test_an_engine_that_ended_is_replaced_and_its_successor_waits_for_weights(place: Place) -> None:
    place.first.dead = True  # type: ignore[attr-defined]
    place.wait(lambda: place.num_ready == 1)
    assert place.keeper.state is EngineState.WAITING
    assert place.lost == [place.server.url]
    assert place.first.stopped  # type: ignore[attr-defined]
    assert place.keeper.engine is place.started[0]
    assert place.keeper.num_restarts == 1
    place.keeper.serve()
    assert place.keeper.state is EngineState.SERVING


def test_an_engine_that_does_not_answer_heartbeats_is_replaced(place: Place) -> None:
    place.server.healthy = False
    place.wait(lambda: bool(place.lost))
    place.server.healthy = True
    place.wait(lambda: place.num_ready == 1)
    assert place.first.stopped  # type: ignore[attr-defined]


def test_silence_is_no_fault_while_weights_change(place: Place) -> None:
    place.keeper.rest()
    place.server.healthy = False
    time.sleep(10 * PATIENCE.interval_s)
    assert place.keeper.state is EngineState.SERVING
    place.server.healthy = True
    place.keeper.wake()
    place.server.healthy = False
    place.wait(lambda: bool(place.lost))


def test_an_engine_that_does_not_take_weights_is_replaced(place: Place) -> None:
    place.keeper.replace("it refused")
    place.wait(lambda: place.num_ready == 1)
    assert place.keeper.num_restarts == 1


def test_engines_that_fail_again_and_again_are_given_up_with_the_reason(place: Place) -> None:
    place.stillborn = 9
    place.first.dead = True  # type: ignore[attr-defined]
    place.wait(lambda: place.keeper.failure is not None)
    assert isinstance(place.keeper.failure, EngineError)
    reason = str(place.keeper.failure)
    assert re.search(r"replaced 2 times within 10 minutes.*has ended\n.*--rollout-engine-max-restarts 2 ", reason)
    assert place.keeper.state is EngineState.LOST
    assert len(place.started) == 2


def test_a_successor_that_cannot_be_taken_ends_the_run_instead_of_the_watching_alone(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(self: Place, keeper: EngineKeeper) -> None:
        raise EngineError("the router is gone")

    monkeypatch.setattr(Place, "ready", ready)
    place = Place(server)
    place.first.dead = True  # type: ignore[attr-defined]
    place.wait(lambda: place.keeper.failure is not None)
    assert "the router is gone" in str(place.keeper.failure)
    assert place.keeper.state is EngineState.LOST
    place.keeper.stop()


def test_an_engine_that_ends_while_it_starts_is_replaced_again(place: Place) -> None:
    place.stillborn = 1
    place.first.dead = True  # type: ignore[attr-defined]
    place.wait(lambda: place.num_ready == 1)
    assert [engine.dead for engine in place.started] == [True, False]


def test_a_successor_that_is_not_ready_makes_room_and_another_starts_after_the_rest(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowEngine(FakeEngine):
        """Is ready when it is allowed to, and ends when it is told to."""

        def __init__(self, server: FakeServer) -> None:
            super().__init__(server)
            self.moment = threading.Event()

        def wait_ready(self, deadline_s: float) -> None:
            self.moment.wait(60)
            if self.stopped:
                raise EngineError("it has ended while starting")

        def stop(self, deadline_s: float = 10.0) -> None:
            super().stop()
            self.moment.set()

    engines: list[SlowEngine] = []

    def start(self: Place) -> SlowEngine:
        engines.append(SlowEngine(self.server))
        return engines[-1]

    monkeypatch.setattr(Place, "start", start)
    place = Place(server, Patience(interval_s=9, timeout_s=30, max_restarts=1))
    place.first.dead = True  # type: ignore[attr-defined]
    place.wait(lambda: len(engines) == 1 and place.keeper._starting)
    place.keeper.rest()
    place.keeper.step_aside()
    place.wait(lambda: not place.keeper._starting and place.keeper.num_restarts == 0)
    assert engines[0].stopped
    time.sleep(0.05)
    assert (len(engines), place.keeper.num_restarts, place.keeper.state) == (1, 0, EngineState.STARTING)
    place.keeper.wake()
    place.wait(lambda: len(engines) == 2)
    engines[1].moment.set()
    place.wait(lambda: place.num_ready == 1)
    assert (place.keeper.num_restarts, place.keeper.state) == (1, EngineState.WAITING)
    place.keeper.step_aside()
    assert not engines[1].stopped, "who is ready gives memory up as the others do"
    place.keeper.stop()


class CrowdedPlace(Place):
    """Room is a while in coming."""

    def __init__(self, server: FakeServer) -> None:
        self.asked, self.room = threading.Event(), threading.Event()
        super().__init__(server, Patience(interval_s=9, timeout_s=30, max_restarts=2))

    def find_room(self) -> Callable[[], FakeEngine]:
        self.asked.set()
        assert self.room.wait(60)
        return self.start


def test_updates_do_not_wait_for_room_and_nothing_starts_while_they_rest(server: FakeServer) -> None:
    place = CrowdedPlace(server)
    place.first.dead = True  # type: ignore[attr-defined]
    assert place.asked.wait(60)
    place.keeper.rest()
    place.keeper.step_aside()
    assert not place.room.is_set()
    place.room.set()
    place.wait(place.keeper._aside.is_set)
    assert place.started == []
    place.keeper.wake()
    place.wait(lambda: place.num_ready == 1)
    assert (len(place.started), place.keeper.num_restarts) == (1, 1)
    place.keeper.stop()


def test_the_end_of_a_run_does_not_wait_for_room(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "_END_DEADLINE_S", 0.01)
    place = CrowdedPlace(server)
    place.first.dead = True  # type: ignore[attr-defined]
    assert place.asked.wait(60)
    place.keeper.stop()
    assert not place.room.is_set()
    place.room.set()
    place.keeper._thread.join(60)
    assert (place.started, place.keeper.failure) == ([], None)


def test_restarts_long_ago_do_not_count(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "RESTART_WINDOW_S", 0.0)
    place = Place(server, Patience(interval_s=9, timeout_s=30, max_restarts=1))
    for count in (1, 2, 3):
        place.keeper.engine.dead = True  # type: ignore[attr-defined]
        place.wait(lambda count=count: place.num_ready == count)  # type: ignore[misc]
    place.keeper.stop()


def test_stopping_ends_the_engine_and_starts_no_other(place: Place) -> None:
    place.keeper.stop()
    assert place.first.stopped  # type: ignore[attr-defined]
    place.first.dead = True  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert place.started == []
