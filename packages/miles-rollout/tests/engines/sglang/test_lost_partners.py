"""What a decode server keeps until prefill servers have said that they write no more."""

from __future__ import annotations

import math
import socket
import sys
import time
from types import SimpleNamespace

import pytest

from miles.rollout.engines.sglang.environment import SERVER_PACKAGES

sys.path.insert(0, str(SERVER_PACKAGES))

from miles_sglang import lost_partners

LONG_AGO = -math.inf
SLOT = 5


@pytest.fixture
def living():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


@pytest.fixture
def dead():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()


def kept(*writers, since=LONG_AGO, required=1):
    infos = [{"rank_ip": host, "rank_port": str(port)} for host, port in writers]
    request = SimpleNamespace(kv_receiver=SimpleNamespace(bootstrap_infos=infos))
    return (request, since, math.inf, SLOT, required)


def required_words(*entries) -> list[int]:
    """Of each entry, how many words are still to come when SGLang looks at it."""
    seen = []
    queue = SimpleNamespace(_deferred_releases=list(entries))
    lost_partners.freeing(lambda queue: seen.extend(queue._deferred_releases))(queue)
    assert [entry[:4] for entry in seen] == [entry[:4] for entry in entries]
    return [entry[4] for entry in seen]


def test_nobody_waits_for_the_word_of_the_dead(living, dead):
    entries = kept(dead), kept(living), kept(living, dead, required=2), kept(dead, dead, required=2)
    assert required_words(*entries) == [0, 1, 2, 0]


def test_a_word_may_take_its_time(dead):
    assert required_words(kept(dead, since=time.monotonic() + 60)) == [1]


def test_who_owes_no_word_is_not_looked_for():
    nowhere = kept(required=0)
    nowhere[0].kv_receiver.bootstrap_infos = None
    assert required_words(nowhere) == [0]


def test_who_cannot_be_reached_may_live(monkeypatch, dead):
    def unreachable(*_args, **_named):
        raise TimeoutError

    monkeypatch.setattr(lost_partners.socket, "create_connection", unreachable)
    assert required_words(kept(dead)) == [1]


def test_each_is_asked_now_and_then_only(monkeypatch, living):
    monkeypatch.setattr(lost_partners, "_SILENCE_S", math.inf)
    lookout = lost_partners.Lookout()
    monkeypatch.setitem(lookout._seen, living, (time.monotonic(), True))
    assert lookout.is_gone(living)
    monkeypatch.setattr(lost_partners, "_SILENCE_S", 0.0)
    assert not lookout.is_gone(living)
