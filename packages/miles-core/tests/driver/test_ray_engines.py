"""Engines on a Ray cluster of two nodes on this machine.  Ray counts the accelerators that it is told of."""

import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

pytest.importorskip("ray")
pytest.importorskip("miles.rollout")

import ray  # noqa: E402
from listening_engine import ask  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from miles.core.config import Config  # noqa: E402
from miles.core.driver.ray_engines import RayEngines  # noqa: E402
from miles.core.driver.ray_places import Places  # noqa: E402
from miles.core.errors import ConfigError, EngineError  # noqa: E402
from miles.core.protocols.engine import EngineSpec  # noqa: E402

LAUNCHER = "listening_engine:Launcher"
SECOND_NODE = "127.0.0.2"
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two accelerators each."""
    node = {"num_cpus": 8, "num_gpus": 2}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node, node_ip_address=SECOND_NODE)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def reserved(cluster, monkeypatch):
    """Reserve the places of a run's engines, and free them afterwards.

    The run's working directory is this one, where modules of its own are, like the launcher.
    """
    monkeypatch.chdir(Path(__file__).parent)
    kept = []

    def reserve(engines, **values):
        flags = {"device": "cuda", "actor_num_gpus_per_node": 1, "num_gpus_per_node": 2, **values}
        kept.append(Places.reserve(Config.of(**flags), engines))
        return kept[-1]

    yield reserve
    for places in kept:
        places.free()


def launch(engines: RayEngines, index: int, place, tmp_path: Path, **options) -> object:
    spec = EngineSpec(
        "model",
        place.host,
        place.port,
        index,
        num_nodes=place.num_nodes,
        rendezvous=place.rendezvous,
        num_threads=place.num_threads,
        log_path=tmp_path / f"engine-{index}.log",
        options=options,
    )
    return engines.launch(LAUNCHER, spec)


def started(engines: RayEngines, indices, tmp_path: Path):
    found = [
        launch(engines, index, place, tmp_path) for index, place in zip(indices, engines.places(indices), strict=True)
    ]
    for engine in found:
        engine.wait_ready(DEADLINE_S)
    return found


def devices(engine) -> str:
    return ask(engine.url)["devices"]


def host(engine) -> str:
    return ask(engine.url)["spec"]["host"]


def test_each_engine_has_accelerators_of_its_own_and_the_address_of_its_node(reserved, tmp_path):
    engines = started(RayEngines(reserved([0, 1, 2]).engines, host=None, num_threads=0), [0, 1, 2], tmp_path)
    assert SECOND_NODE in {host(engine) for engine in engines}
    (pair,) = [name for name in {host(engine) for engine in engines} if [*map(host, engines)].count(name) == 2]
    beside = [engine for engine in engines if host(engine) == pair]
    assert {devices(engine) for engine in beside} == {"0", "1"}
    threads = [ask(engine.url)["spec"]["num_threads"] for engine in beside]
    assert threads == [max(1, (os.cpu_count() or 1) // 2)] * 2


def test_a_killed_engine_is_told_with_its_log_and_its_place_is_filled_again(reserved, tmp_path):
    engines = RayEngines(reserved([0]).engines, host=None, num_threads=1)
    (first,) = started(engines, [0], tmp_path)
    assert first.alive()
    os.kill(ask(first.url)["pid"], signal.SIGKILL)
    wait_for(lambda: not first.alive())
    told = first.describe_end()
    assert "engine 0 has ended with status -9 (SIGKILL)" in told
    assert "about to listen" in told
    (second,) = started(engines, [0], tmp_path)
    assert second.url != first.url
    second.stop()
    wait_for(lambda: not second.alive())


def test_an_engine_ends_with_its_actor_and_another_actor_takes_the_place(reserved, tmp_path):
    engines = RayEngines(reserved([0]).engines, host=None, num_threads=1)
    (first,) = started(engines, [0], tmp_path)
    pid = ask(first.url)["pid"]
    ray.kill(engines._hosts[0][0])
    wait_for(lambda: not first.alive())
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert "has ended with the Ray actor that owned it, or with its node" in first.describe_end()
    first.stop()
    (second,) = started(engines, [0], tmp_path)
    assert second.alive()


def test_an_engine_that_cannot_start_says_why(reserved, tmp_path):
    engines = RayEngines(reserved([0]).engines, host=None, num_threads=1)
    (place,) = engines.places([0])
    with pytest.raises(EngineError, match="it refuses"):
        launch(engines, 0, place, tmp_path, refuses=True)
    failing = launch(engines, 0, place, tmp_path, fails=True)
    with pytest.raises(EngineError, match="it cannot listen"):
        failing.wait_ready(DEADLINE_S)


def test_an_engine_of_two_nodes_meets_at_the_first_and_ends_with_either(reserved, tmp_path):
    places = reserved([0], rollout_num_gpus_per_engine=4, debug_rollout_only=True)
    engines = RayEngines(places.engines, host=None, num_threads=1)
    (engine,) = started(engines, [0], tmp_path)
    spec = ask(engine.url)["spec"]
    assert (spec["num_nodes"], spec["node_rank"]) == (2, 0)
    assert spec["rendezvous"].startswith(f"{spec['host']}:")
    ray.get(engines._hosts[0][1].stop.remote(5.0))
    wait_for(lambda: not engine.alive())
    assert (tmp_path / "engine-0-node-1.log").exists()


def test_colocated_engines_see_the_accelerators_of_the_ranks(reserved, tmp_path):
    flags = {"colocate": True, "actor_num_nodes": 2, "actor_num_gpus_per_node": 2, "rollout_num_gpus_per_engine": 2}
    engines = started(RayEngines(reserved([0, 1], **flags).engines, host=None, num_threads=1), [0, 1], tmp_path)
    assert [devices(engine) for engine in engines] == ["0,1", "0,1"]
    assert host(engines[0]) != host(engines[1])


def test_one_address_for_engines_of_several_nodes_is_refused(reserved):
    places = reserved([0, 1, 2])
    with pytest.raises(ConfigError, match=r"--engine-host 127\.0\.0\.1: the engines are on the nodes"):
        RayEngines(places.engines, host="127.0.0.1", num_threads=1).places([0, 1, 2])


def test_more_engines_than_the_cluster_has_room_for_are_told(reserved):
    with pytest.raises(ConfigError, match=r"--rollout-num-gpus-per-engine 2.* 3 x 1 CPU and 2 GPU: .* room for 2"):
        reserved([0, 1, 2], rollout_num_gpus_per_engine=2)


def test_an_engine_whose_node_is_gone_comes_back_on_another(cluster, reserved, tmp_path):
    places = reserved([0, 1], device="cpu", debug_rollout_only=True)
    engines = RayEngines(places.engines, host=None, num_threads=1)
    both = started(engines, [0, 1], tmp_path)
    (lost,) = [index for index in range(2) if host(both[index]) == SECOND_NODE]
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    wait_for(lambda: not both[lost].alive())
    both[lost].stop()
    (other,) = started(engines, [lost], tmp_path)
    assert host(other) != SECOND_NODE


def wait_for(condition) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
