import threading
import time

import pytest

from miles.core.driver import weight_supply
from miles.core.driver.turns import MemoryTurns, Offloading
from miles.core.driver.weight_supply import WeightSupply
from miles.core.errors import EngineError, WeightSyncError
from miles.core.weights.sync import SyncReport


class FakeRollout:
    """Engines ``a`` and ``b``; some of them may be waiting or lost."""

    def __init__(self):
        self.urls = ["a", "b"]
        self.waiting = []
        self.calls = []
        self.dead = None

    def engine_urls(self):
        return list(self.urls)

    def engines_waiting(self):
        return list(self.waiting)

    def check_alive(self):
        if self.dead:
            raise EngineError(self.dead)

    def weights_updating(self):
        self.calls.append("updating")

    def weights_updated(self, version, urls):
        self.calls.append((version, list(urls)))
        self.waiting = [url for url in self.waiting if url not in urls]

    def replace_engine(self, url, reason):
        self.waiting.remove(url)
        self.calls.append((url, reason))


class FakeActors:
    def __init__(self, push=lambda urls, version: None):
        self.push = push
        self.pushes = []

    def update_weights(self, urls, version):
        self.pushes.append((urls, version))
        self.push(urls, version)
        return SyncReport(bytes=1)

    def probe_engines(self):
        return None


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(weight_supply, "DEATH_NOTICE_S", 0.2)
    monkeypatch.setattr(weight_supply, "_LOOK_INTERVAL_S", 0.01)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_update_reaches_every_engine():
    rollout, actors = FakeRollout(), FakeActors()
    assert WeightSupply(rollout, actors).update(3).bytes == 1
    assert actors.pushes == [(["a", "b"], 3)]
    assert rollout.calls == ["updating", (3, ["a", "b"])]


def test_without_engines_there_is_nothing_to_update():
    rollout = FakeRollout()
    rollout.urls = []
    assert WeightSupply(rollout, FakeActors()).update(3) is None


def test_an_engine_that_is_lost_during_an_update_is_left_out():
    rollout = FakeRollout()

    def fail_once(urls, version):
        if "b" in urls:
            rollout.urls = ["a"]
            raise EngineError("b does not answer")

    actors = FakeActors(fail_once)
    WeightSupply(rollout, actors, replaces=True).update(3)
    assert actors.pushes == [(["a", "b"], 3), (["a"], 3)]
    assert rollout.calls == ["updating", (3, []), "updating", (3, ["a"])]


def test_an_engine_that_died_and_is_not_replaced_is_named():
    rollout = FakeRollout()

    def fail(urls, version):
        rollout.dead = "engine 1 has ended"
        raise EngineError("b does not answer")

    with pytest.raises(EngineError, match="engine 1 has ended"):
        WeightSupply(rollout, FakeActors(fail)).update(3)


def test_a_refusal_of_living_engines_is_told_as_it_is():
    def refuse(urls, version):
        raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"):
        WeightSupply(FakeRollout(), FakeActors(refuse), replaces=True).update(3)


def test_a_new_engine_gets_the_weights_the_trainer_has_now():
    rollout, actors = FakeRollout(), FakeActors()
    supply = WeightSupply(rollout, actors, replaces=True)
    supply.start()
    try:
        supply.update(3)
        with supply.trainer(becomes=4):
            rollout.waiting = ["c"]
            time.sleep(0.05)
            assert len(actors.pushes) == 1, "the trainer is busy"
        wait_until(lambda: not rollout.waiting)
        assert actors.pushes[1] == (["c"], 4)
        assert rollout.calls[-1] == (4, ["c"])
    finally:
        supply.stop()


def test_a_new_engine_that_does_not_take_the_weights_is_replaced_again():
    rollout = FakeRollout()

    def refuse(urls, version):
        if urls == ["c"]:
            raise WeightSyncError("holds something else")

    supply = WeightSupply(rollout, FakeActors(refuse), replaces=True)
    supply.start()
    try:
        supply.update(3)
        rollout.waiting = ["c"]
        wait_until(lambda: rollout.calls[-1][0] == "c")
        assert "did not take weights: holds something else" in rollout.calls[-1][1]
    finally:
        supply.stop()


def test_new_engines_wait_for_the_first_update():
    rollout, actors = FakeRollout(), FakeActors()
    supply = WeightSupply(rollout, actors, replaces=True)
    rollout.waiting = ["b"]
    supply.start()
    time.sleep(0.05)
    assert actors.pushes == []
    supply.stop()
    assert not any(thread.name == "weight-supply" for thread in threading.enumerate())


def test_a_new_engine_gets_weights_of_a_trainer_that_sleeps():
    rollout, log = FakeRollout(), []
    actors = FakeActors(lambda urls, version: log.append("sent"))
    actors.onload, actors.offload = lambda: log.append("wakes"), lambda: log.append("sleeps") or 0
    supply = WeightSupply(rollout, actors, MemoryTurns(rollout, actors, Offloading(trainer=True)), replaces=True)
    supply.start()
    try:
        supply.update(3)
        rollout.waiting = ["c"]
        wait_until(lambda: not rollout.waiting)
        assert log == ["sent", "sleeps", "wakes", "sent", "sleeps"]
    finally:
        supply.stop()


def test_a_new_engine_beside_others_that_work_gets_the_weights_that_they_have():
    rollout, actors, repeated = FakeRollout(), FakeActors(), []
    actors.repeat_weights = lambda urls, version: repeated.append((urls, version))
    supply = WeightSupply(rollout, actors, replaces=True, repeats=True)
    supply.start()
    try:
        supply.update(3)
        with supply.trainer(becomes=4):
            rollout.waiting = ["c"]
        wait_until(lambda: not rollout.waiting)
        assert repeated == [(["c"], 3)]
        assert rollout.calls[-1] == (3, ["c"])
    finally:
        supply.stop()


def test_when_an_update_lost_all_engines_it_waits_for_the_next_one_which_gets_the_trainers_weights():
    rollout, repeated = FakeRollout(), []

    def lose_all(urls, version):
        if version == 3 and urls != ["c"]:
            rollout.urls = []
            threading.Timer(0.05, lambda: rollout.urls.append("c")).start()
            raise EngineError("nobody answers")

    actors = FakeActors(lose_all)
    actors.repeat_weights = lambda urls, version: repeated.append((urls, version))
    supply = WeightSupply(rollout, actors, replaces=True, repeats=True)
    supply.start()
    try:
        supply.update(2)
        assert supply.update(3).bytes == 1
        assert actors.pushes[-1] == (["c"], 3)
        rollout.waiting = ["d"]
        wait_until(lambda: not rollout.waiting)
        assert repeated == [(["d"], 3)]
    finally:
        supply.stop()


def test_an_update_that_lost_all_engines_ends_when_no_more_are_started():
    rollout = FakeRollout()
    rollout.urls = []
    threading.Timer(0.05, lambda: setattr(rollout, "dead", "given up after 3 engines")).start()
    with pytest.raises(EngineError, match="given up after 3 engines"):
        WeightSupply(rollout, FakeActors(), replaces=True, repeats=True).update(3)


def test_engines_that_are_lost_asleep_leave_their_memory_to_their_successors():
    rollout, log = FakeRollout(), []

    def lose_all(urls, version):
        if version == 3 and rollout.urls:
            rollout.urls = []
            raise EngineError("nobody answers")

    actors = FakeActors(lose_all)
    actors.onload, actors.offload = lambda: log.append("wakes"), lambda: log.append("sleeps") or 0
    rollout.release_memory = lambda tags: log.append("released") or 0
    rollout.resume_memory = lambda tags: log.append(tuple(sorted(tags)))
    turns = MemoryTurns(rollout, actors, Offloading(trainer=True, engines=True))
    supply = WeightSupply(rollout, actors, turns, replaces=True)
    supply.start()
    try:
        with supply.trainer(becomes=3):
            pass
        assert supply.update(3) is None
        assert log == ["released", ("weights",), "sleeps", ("cuda_graph", "kv_cache")]
        rollout.waiting = ["c"]
        wait_until(lambda: not rollout.waiting)
        assert actors.pushes[-1] == (["c"], 3)
    finally:
        supply.stop()
