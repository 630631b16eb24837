"""Engines on the nodes of a Ray cluster: an actor on its node owns the process of each."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles.core import environ
from miles.core.driver.ray_room import PLACEMENT_DEADLINE_S
from miles.core.errors import ConfigError, EngineError, MilesError
from miles.core.ports import LOOPBACK, free_ports
from miles.core.protocols.engine import EngineLauncher, EnginePlace, EngineProcess, EngineSpec
from miles.core.registry import Registry, import_from

ENGINES = Registry("miles.engines")

_CALL_DEADLINE_S = 60.0
"""For what an actor answers at once: it is slow where its machine is."""
_POLL_S = 0.05
_PORTS = 3
"""Of an engine: where it serves, where its nodes meet, and where a prefill server is found."""


@dataclass(frozen=True, slots=True)
class Seat:
    """The share of the cluster that an engine has on one node."""

    placement: PlacementGroup
    bundle: int
    num_gpus: float = 0.0
    """Taken from the bundle, and to be seen by the engine."""
    gpus: tuple[str, ...] | None = None
    """Accelerators that are the trainer's, which the engine sees in place of those."""

    def reserve(self, working_directory: Path) -> Any:
        """Start the actor of this seat; it waits for the bundle, which Ray moves to another node when its own dies."""
        strategy = PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=self.bundle)
        # One thread waits for the engine to be ready, one for its end, one answers meanwhile.
        return (
            ray.remote(EngineHost)
            .options(
                num_cpus=0 if self.gpus is not None else 1,
                num_gpus=self.num_gpus,
                max_concurrency=4,
                scheduling_strategy=strategy,
            )
            .remote(working_directory, self.gpus)
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """Where an actor is."""

    node: str
    address: str
    num_cpus: int


class EngineHost:
    """The actor on a node: owner of one engine's process there, which ends with it."""

    def __init__(self, working_directory: Path, gpus: Sequence[str] | None) -> None:
        os.chdir(working_directory)
        import_from(working_directory)
        if gpus is not None:
            environ.set_visible_devices(gpus)
        self._engine: EngineProcess | None = None

    def facts(self) -> Facts:
        """Where this is."""
        return Facts(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.cpu_count() or 1)

    def free_ports(self, count: int, host: str) -> list[int]:
        """Ports of this node that nobody listens on."""
        return free_ports(count, host)

    def launch(self, engine: str, spec: EngineSpec) -> None:
        """Start the engine and return at once.  Its log begins with the node that it is on."""
        if spec.log_path is not None:
            spec.log_path.parent.mkdir(parents=True, exist_ok=True)
            with spec.log_path.open("a", encoding="utf-8") as log:
                log.write(f"http://{spec.host}:{spec.port} on node {self.facts().address} of the Ray cluster\n")
        launcher: EngineLauncher = ENGINES.get(engine)()
        self._engine = launcher.launch(spec)

    def wait_ready(self, deadline_s: float) -> None:
        """See EngineProcess."""
        self._launched().wait_ready(deadline_s)

    def wait_end(self) -> str:
        """Return when the engine that was launched last has ended: what EngineProcess says of its end."""
        engine = self._launched()
        while engine.alive():
            time.sleep(_POLL_S)
        return engine.describe_end()

    def stop(self, deadline_s: float) -> None:
        """See EngineProcess."""
        if self._engine is not None:
            self._engine.stop(deadline_s)

    def _launched(self) -> EngineProcess:
        assert self._engine is not None, "launch() comes first"
        return self._engine


class RayEngine:
    """A started engine: its process on each of its nodes, of which the first serves.  See EngineProcess."""

    def __init__(self, url: str, name: str, hosts: Sequence[Any]) -> None:
        self.url, self._name, self._hosts = url, name, hosts
        self._ends = [host.wait_end.remote() for host in hosts]

    def wait_ready(self, deadline_s: float) -> None:
        """See EngineProcess.  The first node would wait for others that have ended."""
        ready = self._hosts[0].wait_ready.remote(deadline_s)
        done, _ = ray.wait([ready, *self._ends], num_returns=1)
        if ready in done:
            _result(ready, self._name)
        else:
            raise EngineError(f"while starting: {self.describe_end()}")

    def alive(self) -> bool:
        """See EngineProcess: no process of it has ended."""
        return not self._ended()

    def describe_end(self) -> str:
        """See EngineProcess."""
        ended = self._ended()
        if not ended:
            return f"{self._name} runs"
        try:
            told: str = _result(ended[0], self._name)
        except EngineError as error:
            return str(error)
        return told

    def stop(self, deadline_s: float = 10.0) -> None:
        """See EngineProcess.  A process whose actor does not answer has ended with it, or ends with the run."""
        with suppress(ray.exceptions.RayError, TimeoutError):
            ray.get([host.stop.remote(deadline_s) for host in self._hosts], timeout=deadline_s + _CALL_DEADLINE_S)

    def _ended(self) -> list[Any]:
        ended, _ = ray.wait(self._ends, num_returns=1, timeout=0)
        return list(ended)


class RayEngines:
    """The shares of the engines, by index.  See EngineHosts.

    ``host`` is ``--engine-host``; without it engines listen at the address of their node, or at 127.0.0.1 where the
    cluster is one machine.  ``num_threads``: 0 divides a node's cores among its engines.  Travels to the rollout side
    before it is used.
    """

    def __init__(self, seats: Mapping[int, Sequence[Seat]], *, host: str | None, num_threads: int) -> None:
        self._seats, self._host, self._num_threads = seats, host, num_threads
        self._working_directory = Path.cwd()
        self._hosts: dict[int, list[Any]] = {}
        self._facts: dict[int, list[Facts]] = {}

    def places(self, indices: Sequence[int]) -> list[EnginePlace]:
        """See EngineHosts."""
        for index in indices:
            self._hosts.setdefault(index, self._reserve(index))
        for index in indices:
            self._facts[index] = self._located(index)
        self._check_host()
        one_machine = sum(bool(node["Alive"]) for node in ray.nodes()) == 1
        taken = {node: iter(ports) for node, ports in self._ports(indices, one_machine=one_machine).items()}
        return [self._place(index, taken, one_machine=one_machine) for index in indices]

    def launch(self, engine: str, spec: EngineSpec) -> RayEngine:
        """See EngineHosts."""
        hosts = self._hosts[spec.index]
        name = f"engine {spec.index} on node {self._facts[spec.index][0].address}"
        for rank, host in enumerate(hosts):
            _result(host.launch.remote(engine, self._on_node(spec, rank)), name)
        return RayEngine(f"http://{spec.host}:{spec.port}", name, hosts)

    def _reserve(self, index: int) -> list[Any]:
        return [seat.reserve(self._working_directory) for seat in self._seats[index]]

    def _located(self, index: int) -> list[Facts]:
        """Where the actors of an engine are.  New ones take the places of those that died, with their node or alone."""
        hosts, deadline = self._hosts[index], time.monotonic() + PLACEMENT_DEADLINE_S
        while True:
            for rank, seat in enumerate(self._seats[index]):
                if _has_died(hosts[rank]):
                    hosts[rank] = seat.reserve(self._working_directory)
            try:
                facts: list[Facts] = ray.get(
                    [host.facts.remote() for host in hosts], timeout=max(0.0, deadline - time.monotonic())
                )
                return facts
            except ray.exceptions.GetTimeoutError:
                raise EngineError(
                    f"no node of the Ray cluster had room for engine {index} within {PLACEMENT_DEADLINE_S:.0f} s: "
                    f"{ray.available_resources()} is free"
                ) from None
            except ray.exceptions.RayActorError as error:
                # One that was sent to a node of whose death Ray learns only now finds another place.
                if error.actor_init_failed or time.monotonic() > deadline:
                    raise EngineError(
                        f"the Ray actor that is to own engine {index} could not be started: {error}"
                    ) from error

    def _check_host(self) -> None:
        nodes = sorted({one.address for facts in self._facts.values() for one in facts})
        if self._host is not None and len(nodes) > 1:
            raise ConfigError(
                f"--engine-host {self._host}: the engines are on the nodes {', '.join(nodes)} of the Ray cluster, and "
                "each listens at the address of its own. Leave it out"
            )

    def _ports(self, indices: Sequence[int], *, one_machine: bool) -> dict[str, list[int]]:
        """Free ports by node: those of each engine that begins there.

        One actor of a node chooses them all: two might choose the same.
        """
        asked: dict[str, list[int]] = {}
        for index in indices:
            asked.setdefault(self._facts[index][0].node, []).append(index)
        calls = {
            node: self._hosts[here[0]][0].free_ports.remote(
                _PORTS * len(here), self._address(here[0], one_machine=one_machine)
            )
            for node, here in asked.items()
        }
        return {node: _result(call, f"node {node}") for node, call in calls.items()}

    def _place(self, index: int, ports: dict[str, Iterator[int]], *, one_machine: bool) -> EnginePlace:
        facts, host = self._facts[index], self._address(index, one_machine=one_machine)
        port, meeting, bootstrap = itertools.islice(ports[facts[0].node], _PORTS)
        return EnginePlace(
            host,
            port,
            bootstrap_port=bootstrap,
            num_threads=self._num_threads or max(1, facts[0].num_cpus // self._engines_on(facts[0].node)),
            num_nodes=len(facts),
            rendezvous=f"{host}:{meeting}" if len(facts) > 1 else None,
        )

    def _address(self, index: int, *, one_machine: bool) -> str:
        return self._host or (LOOPBACK if one_machine else self._facts[index][0].address)

    def _engines_on(self, node: str) -> int:
        return sum(one.node == node for facts in self._facts.values() for one in facts)

    def _on_node(self, spec: EngineSpec, rank: int) -> EngineSpec:
        """What the process on the engine's node ``rank`` is started with."""
        if rank == 0:
            return spec
        host = self._facts[spec.index][rank].address
        (port,) = _result(self._hosts[spec.index][rank].free_ports.remote(1, host), f"node {host}")
        log = spec.log_path and spec.log_path.with_name(f"{spec.log_path.stem}-node-{rank}{spec.log_path.suffix}")
        return replace(spec, node_rank=rank, host=host, port=port, log_path=log)


def _has_died(host: Any) -> bool:
    """Whether an actor is no more; one that waits for room has not died."""
    try:
        ray.get(host.facts.remote(), timeout=_CALL_DEADLINE_S)
    except ray.exceptions.RayActorError:
        return True
    except ray.exceptions.GetTimeoutError:
        return False
    return False


def _result(call: Any, name: str) -> Any:
    """The result of an actor's call; EngineError when the actor is lost, with which its engine has ended."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        cause = error.as_instanceof_cause()
        if isinstance(cause, MilesError):
            raise cause from error
        raise
    except ray.exceptions.RayActorError as error:
        raise EngineError(f"{name} has ended with the Ray actor that owned it, or with its node: {error}") from error
