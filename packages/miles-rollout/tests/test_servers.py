"""Real processes: a router in front of fake engines."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rollout_fakes import FakeLauncher, FakeServer, answer

from miles.core.config import Config
from miles.core.errors import ConfigError, EngineError, WeightSyncError
from miles.rollout import control
from miles.rollout.engines.external import ExternalEngine
from miles.rollout.keeper import EngineState
from miles.rollout.servers import Servers, _router_flags


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        FakeLauncher.server, FakeLauncher.specs, FakeLauncher.engines = server, [], []
        yield server


def make(tmp_path: Path, **values: Any) -> Servers:
    given = {
        "hf_checkpoint": "model",
        "rollout_engine": "rollout_fakes:FakeLauncher",
        "rollout_num_engines": 1,
        "device": "cpu",
        **values,
    }
    return Servers(Config.of(**given), tmp_path)


def test_requests_reach_the_engine_through_the_router(tmp_path: Path, server: FakeServer) -> None:
    pytest.importorskip("miles.router")
    servers = make(tmp_path)
    try:
        servers.launch()
        servers.wait_ready()
        servers.check_alive()
        payload = {"input_ids": [1, 2], "sampling_params": {"sampling_seed": 1}}
        request = urllib.request.Request(
            servers.router.url + "/generate", json.dumps(payload).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            assert json.load(response) == answer(payload)
        assert servers.engine_urls == [server.url]
        router = servers._router
        assert router is not None
    finally:
        servers.stop()
    assert not router.alive()
    assert FakeLauncher.engines[0].stopped
    assert (tmp_path / "logs/router.log").exists()


def test_a_router_that_died_is_noticed(tmp_path: Path, server: FakeServer) -> None:
    pytest.importorskip("miles.router")
    servers = make(tmp_path)
    try:
        servers.launch()
        servers.wait_ready()
        assert servers._router is not None
        os.kill(servers._router.pid, 9)
        while servers._router.alive():
            pass
        with pytest.raises(EngineError, match="the router has ended with status -9"):
            servers.check_alive()
    finally:
        servers.stop()


def test_a_router_that_already_runs_is_used(tmp_path: Path, server: FakeServer) -> None:
    servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=server.port)
    servers.launch()
    servers.wait_ready()
    assert servers.router.url == server.url
    servers.stop()


def test_a_router_that_cannot_be_reached_is_named(tmp_path: Path, server: FakeServer) -> None:
    servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=9)
    servers.launch()
    with pytest.raises(EngineError, match=r"router at http://127\.0\.0\.1:9 did not take engine"):
        servers.wait_ready()
    servers.stop()


def test_engines_that_already_run_are_used_and_left_alone(tmp_path: Path, server: FakeServer) -> None:
    address = server.url.removeprefix("http://")
    values = {"rollout_external": True, "rollout_external_engine_addrs": [address]}
    servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=server.port, **values)
    servers.launch()
    servers.wait_ready()
    servers.check_alive()
    assert servers.engine_urls == [server.url]
    assert FakeLauncher.engines == []
    servers.stop()


@pytest.mark.parametrize("lacking", [("kv_cache",), ("kv_cache", "weights")])
def test_engines_of_others_have_their_memory_again_when_a_run_ends_in_the_middle(
    tmp_path: Path, server: FakeServer, lacking: tuple[str, ...]
) -> None:
    values = {"rollout_external": True, "rollout_external_engine_addrs": [server.url]}
    servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=server.port, **values)
    servers.launch()
    servers.release_memory(("kv_cache", "weights"))
    if "weights" not in lacking:
        servers.resume_memory(("weights",))
    servers.stop()
    servers.stop()
    assert server.memory[-1] == ("resume", lacking)
    assert server.loaded == (["/their/model"] if "weights" in lacking else [])


def test_an_external_engine_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9 is not ready: ConnectionRefusedError"):
        ExternalEngine("127.0.0.1:9").wait_ready(0)


def test_a_lost_engine_is_replaced_and_serves_when_it_holds_the_weights(tmp_path: Path, server: FakeServer) -> None:
    quick = {"use_fault_tolerance": True, "rollout_health_check_interval": 0.1}
    servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=server.port, **quick)
    servers.launch()
    servers.wait_ready()
    try:
        assert servers.waiting_urls == []
        FakeLauncher.engines[0].dead = True
        deadline = time.monotonic() + 60
        while not servers.waiting_urls:
            servers.check_alive()
            assert time.monotonic() < deadline
        assert len(FakeLauncher.engines) == 2
        assert servers.metrics() == {"rollout/engine_restarts": 1}
        assert servers.metrics() == {"rollout/engine_restarts": 0}
        server.version = "6"
        with pytest.raises(WeightSyncError, match="says that it holds weight version 6, not 7"):
            servers.admit(7, servers.engine_urls)
        assert servers.waiting_urls
        server.version = "7"
        servers.admit(7, servers.engine_urls)
        assert servers.waiting_urls == []
        assert servers.engine_urls == [server.url]
    finally:
        servers.stop()
    assert FakeLauncher.engines[1].stopped


def test_an_engine_that_cannot_be_replaced_ends_the_run(tmp_path: Path, server: FakeServer) -> None:
    none_left = {"use_fault_tolerance": True, "rollout_engine_max_restarts": 0}
    servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=server.port, **none_left)
    servers.launch()
    servers.wait_ready()
    FakeLauncher.engines[0].dead = True
    (keeper,) = servers._keepers
    deadline = time.monotonic() + 60
    while keeper.failure is None:
        assert time.monotonic() < deadline
    with pytest.raises(EngineError, match=r"is lost again: the fake engine at .* has ended"):
        servers.check_alive()
    servers.stop()


def test_the_router_is_told_the_runs_flags() -> None:
    pytest.importorskip("miles.router")
    config = Config.of(rollout_health_check_interval=2, miles_router_timeout=7, miles_router_max_connections=9)
    flags = dict(zip(_router_flags(config)[::2], _router_flags(config)[1::2], strict=True))
    assert (flags["--health-check-interval-s"], flags["--request-timeout-s"]) == ("2.0", "7.0")
    assert (flags["--max-connections"], flags["--health-check-failure-threshold"]) == ("9", "3")
    assert _router_flags(Config.of())[:2] == ["--request-timeout-s", "14400"]


def test_the_router_gets_middleware_and_sessions_of_the_run() -> None:
    pytest.importorskip("miles.router")
    flags = _router_flags(
        Config.of(
            hf_checkpoint="model",
            miles_router_policy="sticky",
            miles_router_middleware_paths=["a.B", "radix_cache"],
            use_session_server=True,
            use_rollout_routing_replay=True,
        )
    )
    wanted = (
        "--policy sticky --middleware a.B radix_cache --tokenizer model --sessions --session-tool-parser auto "
        "--session-routed-experts"
    )
    assert flags[-len(wanted.split()) :] == wanted.split()
    assert "--tokenizer" not in _router_flags(Config.of(hf_checkpoint="model"))


def test_a_model_is_required(tmp_path: Path, server: FakeServer) -> None:
    servers = make(tmp_path, hf_checkpoint=None, sglang_router_ip="127.0.0.1", sglang_router_port=9)
    with pytest.raises(ConfigError, match="--hf-checkpoint is not set"):
        servers.launch()


def test_engines_give_memory_up_and_a_lost_one_comes_back_when_the_others_have_theirs(
    tmp_path: Path, server: FakeServer
) -> None:
    quick = {"use_fault_tolerance": True, "rollout_health_check_interval": 0.05}
    servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=server.port, **quick)
    servers.launch()
    servers.wait_ready()
    (keeper,) = servers._keepers
    try:
        assert servers.release_memory(("kv_cache", "weights")) == 11
        servers.resume_memory(("weights",))
        assert server.memory == [("release", ("kv_cache", "weights")), ("resume", ("weights",))]
        FakeLauncher.engines[0].dead = True
        deadline = time.monotonic() + 60
        while servers.engine_urls:
            assert time.monotonic() < deadline
        assert not keeper._thread.join(0.3)
        assert len(FakeLauncher.engines) == 1
        servers.resume_memory(("kv_cache",))
        while not servers.waiting_urls:
            assert time.monotonic() < deadline
        assert len(server.memory) == 2, "the new engine has never given memory up"
    finally:
        servers.stop()


def test_the_rest_of_a_fleet_that_lost_everyone_ends_with_the_last_kind_of_memory(
    tmp_path: Path, server: FakeServer
) -> None:
    patient = {"use_fault_tolerance": True, "rollout_health_check_interval": 60.0}
    servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=server.port, **patient)
    servers.launch()
    (keeper,) = servers._keepers
    keeper.state = EngineState.STARTING
    assert servers.release_memory(("kv_cache", "weights")) == 0
    servers.resume_memory(("weights",))
    assert keeper._resting == 1
    servers.resume_memory(("kv_cache",))
    assert keeper._resting == 0
    servers.stop()


def test_an_engine_that_does_not_give_memory_up_is_named(tmp_path: Path) -> None:
    with FakeServer() as gone:
        FakeLauncher.server = gone
        servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=gone.port)
        servers.launch()
        url = gone.url
    with pytest.raises(EngineError, match=rf"{url}/flush_cache gave no answer"):
        servers.release_memory(("kv_cache",))
    servers.stop()


def test_an_engine_gets_a_moment_to_become_idle(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_POLL_S", 0.001)
    server.refusals = 3
    assert control.release_memory(server.url, ("kv_cache",)) == 11
    monkeypatch.setattr(control, "FLUSH_DEADLINE_S", 0.0)
    server.refusals = 99
    with pytest.raises(EngineError, match="flush_cache answered 400"):
        control.release_memory(server.url, ("kv_cache",))


def test_engines_listen_where_they_are_told(tmp_path: Path, server: FakeServer) -> None:
    servers = make(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port=server.port, engine_host="127.0.0.2")
    servers.launch()
    assert [spec.host for spec in FakeLauncher.specs] == ["127.0.0.2"]
    servers.stop()
    with pytest.raises(ConfigError, match=r"no server can listen at 203\.0\.113\.1: .* that of --engine-host"):
        make(tmp_path, engine_host="203.0.113.1").launch()
