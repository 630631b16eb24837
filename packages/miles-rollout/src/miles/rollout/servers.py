"""The processes of the rollout side: engines, and the router in front of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from miles.core.errors import ConfigError, EngineError, WeightSyncError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.cluster import Cluster
from miles.core.flags.debug import Debug
from miles.core.flags.training import Training
from miles.core.ports import LOOPBACK, free_ports
from miles.core.process import ChildProcess
from miles.core.protocols.engine import EngineHosts, EngineLauncher, EnginePlace, EngineProcess, EngineSpec
from miles.core.registry import Registry
from miles.core.run_directory import RunDirectory
from miles.rollout import control, sessions
from miles.rollout.engine_options import engine_options
from miles.rollout.engines.external import ExternalEngine
from miles.rollout.engines.here import ThisMachine
from miles.rollout.engines.sglang.adapters import adapter_options
from miles.rollout.flags import Engines, FaultTolerance, Rollout
from miles.rollout.front import Front, part_of
from miles.rollout.keeper import EngineKeeper, EngineState, Launch, Patience

if TYPE_CHECKING:
    from miles.core.config import Config

logger = logging.getLogger(__name__)

ENGINES = Registry("miles.engines")

S = TypeVar("S")
T = TypeVar("T")
ENGINE_DEADLINE_S = 1800.0
"""Large models load for a long time; a dead engine is noticed at once."""
ROUTER_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class Servers:
    """Starts and stops engines and router, knows whether they live, and replaces engines where the run wants that.

    Engines live on ``hosts``: on this machine without them.
    """

    def __init__(self, config: Config, run_dir: Path, hosts: EngineHosts | None = None) -> None:
        self._config = config
        self._hosts = hosts or ThisMachine(config)
        self._front = Front(lambda: self.router.url)
        self._logs = RunDirectory(run_dir)
        self._engines: list[EngineProcess] = []
        self._keepers: list[EngineKeeper] = []
        self._restarts_told = 0
        self._sleeping: list[str] = []
        """Addresses of engines that have given memory up."""
        self._released: set[str] = set()
        """Kinds of it that they still lack."""
        self._router: ChildProcess | None = None
        self._router_address: Address | None = None

    @property
    def router(self) -> Address:
        """Of the router that was started, or of ``--sglang-router-ip``."""
        assert self._router_address is not None, "launch() comes first"
        return self._router_address

    @property
    def engine_urls(self) -> list[str]:
        """Of the engines that hold the policy's weights, or wait for them."""
        if not self._keepers:
            return [engine.url for engine in self._engines]
        return self._urls_of(EngineState.SERVING, EngineState.WAITING)

    @property
    def waiting_urls(self) -> list[str]:
        """Of the engines that were started in place of others and have no weights yet."""
        return self._urls_of(EngineState.WAITING)

    def launch(self) -> None:
        """Start everything and return at once."""
        engines, addresses = self._config[Engines], self._config[Rollout].rollout_external_engine_addrs
        self._router_address = self._start_router(engines)
        if self._config[Rollout].rollout_external:
            self._engines = [ExternalEngine(address) for address in addresses or ()]
            return
        launcher: EngineLauncher = ENGINES.get(engines.rollout_engine)()
        problems = launcher.check(engine_options(self._config))
        if problems:
            raise ConfigError(*problems)
        indices = range(engines.rollout_num_engines)
        for index, place in zip(indices, self._hosts.places(indices), strict=True):
            self._engines.append(self._launch(index, place))
        if self._config[FaultTolerance].use_fault_tolerance:
            self._keepers = [self._keeper(index) for index in indices]

    def wait_ready(self) -> None:
        """Return when every engine answers and is known to the router; EngineError otherwise."""
        _at_once(lambda engine: engine.wait_ready(ENGINE_DEADLINE_S), self._engines)
        if self._router is not None:
            self._router.wait_ready(f"{self.router.url}/list_workers", ROUTER_DEADLINE_S)
        for engine in self._engines:
            self._front.open(engine.url)
        for keeper in self._keepers:
            keeper.watch()

    def check_alive(self) -> None:
        """EngineError when a process of ours has ended that is not being replaced."""
        for keeper in self._keepers:
            if keeper.failure is not None:
                raise keeper.failure
        for engine in self._engines if not self._keepers else ():
            if not engine.alive():
                raise EngineError(engine.describe_end())
        if self._router is not None and not self._router.alive():
            raise EngineError(f"the {self._router.describe_end()}")

    def rest(self) -> None:
        """Until ``wake``, an engine's silence is no fault: its weights change, or its memory is released."""
        for keeper in self._keepers:
            keeper.rest()

    def wake(self) -> None:
        """Undo one ``rest``."""
        for keeper in self._keepers:
            keeper.wake()

    def release_memory(self, tags: Sequence[str]) -> int:
        """See RolloutRole.  An engine that is lost is left to its keeper; its successor starts after the rest."""
        self.rest()
        _at_once(lambda keeper: keeper.step_aside(), self._keepers)
        urls = self.engine_urls
        freed = _at_once(lambda url: self._if_alive(url, lambda: control.release_memory(url, tags)), urls)
        self._sleeping = [url for url, found in zip(urls, freed, strict=True) if found is not None]
        self._released = set(tags)
        return sum(found or 0 for found in freed)

    def resume_memory(self, tags: Sequence[str]) -> None:
        """See RolloutRole."""
        urls = [url for url in self._sleeping if url in self.engine_urls]
        _at_once(lambda url: self._if_alive(url, lambda: control.resume_memory(url, tags)), urls)
        self._released.difference_update(tags)
        if not self._released:
            self._sleeping = []
            self.wake()

    def _if_alive(self, url: str, call: Callable[[], T]) -> T | None:
        """The result of ``call``; None when the engine is lost and will be replaced."""
        try:
            return call()
        except EngineError as error:
            if not self._keepers:
                self.check_alive()
                raise
            self.replace(url, str(error))
            return None

    def admit(self, version: int, urls: Sequence[str]) -> None:
        """The engines at ``urls`` took weight version ``version``: check that, and let new ones serve.

        WeightSyncError when an engine says that it holds another version.
        """
        for url in urls:
            held = self._held_version(url)
            if held is not None and held != str(version):
                raise WeightSyncError(f"engine {url} says that it holds weight version {held}, not {version}")
        for keeper in self._keepers:
            if keeper.state is EngineState.WAITING and keeper.engine.url in urls:
                self._front.open(keeper.engine.url)
                keeper.serve()

    def replace(self, url: str, reason: str) -> None:
        """Have the engine at ``url`` replaced: it could not be brought to the trainer's weights."""
        for keeper in self._keepers:
            if keeper.engine.url == url:
                keeper.replace(reason)

    def metrics(self) -> dict[str, float]:
        """How many engines were replaced since the last call; nothing where none ever is."""
        if not self._keepers:
            return {}
        count = sum(keeper.num_restarts for keeper in self._keepers)
        since, self._restarts_told = count - self._restarts_told, count
        return {"rollout/engine_restarts": since}

    def stop(self) -> None:
        """End every process, and give engines of others back what they had.  Safe to call twice."""
        if self._config[Rollout].rollout_external:
            _at_once(self._wake_for_its_owner, self._sleeping)
            self._sleeping = []
        processes: list[EngineKeeper | EngineProcess | ChildProcess] = [*(self._keepers or self._engines)]
        if self._router is not None:
            processes.append(self._router)
        self._engines, self._keepers, self._router = [], [], None
        _at_once(lambda process: process.stop(), processes)

    def _wake_for_its_owner(self, url: str) -> None:
        """The run ends in the middle, and who has started the engine would find it asleep."""
        try:
            control.resume_memory(url, sorted(self._released))
            if "weights" in self._released:
                control.load_own_weights(url)
        except EngineError as error:
            logger.warning("an external engine stays without the memory that it gave up: %s", error)

    def _urls_of(self, *states: EngineState) -> list[str]:
        return [keeper.engine.url for keeper in self._keepers if keeper.state in states]

    def _launch(self, index: int, place: EnginePlace) -> EngineProcess:
        spec = engine_spec(self._config, index, place, self._logs)
        engine = self._hosts.launch(self._config[Engines].rollout_engine, spec)
        self._front.know(engine.url, spec)
        return engine

    def _keeper(self, index: int) -> EngineKeeper:
        def find_room() -> Launch:
            (place,) = self._hosts.places([index])
            return lambda: self._launch(index, place)

        faults = self._config[FaultTolerance]
        patience = Patience(
            interval_s=faults.rollout_health_check_interval,
            timeout_s=faults.rollout_health_check_timeout,
            first_wait_s=faults.rollout_health_check_first_wait,
            max_restarts=faults.rollout_engine_max_restarts,
        )
        return EngineKeeper(
            self._engines[index],
            find_room=find_room,
            patience=patience,
            on_lost=self._front.close,
            on_ready=self._succeeded,
        )

    def _succeeded(self, keeper: EngineKeeper) -> None:
        """An engine is ready in place of a lost one.  Without a trainer it serves at once, as the first one did."""
        if self._config[Debug].debug_rollout_only:
            self._front.open(keeper.engine.url)
            keeper.serve()

    def _held_version(self, url: str) -> str | None:
        """What the engine says it holds; None when it does not answer, which its keeper or the next request notices."""
        try:
            return control.held_version(url)
        except EngineError as error:
            logger.warning("%s", error)
            return None

    def _start_router(self, engines: Engines) -> Address:
        if engines.sglang_router_ip is not None:
            if engines.sglang_router_port is None:
                raise ConfigError(
                    f"--sglang-router-ip {engines.sglang_router_ip}: give its --sglang-router-port as well"
                )
            return Address(engines.sglang_router_ip, engines.sglang_router_port)
        address = Address(LOOPBACK, engines.sglang_router_port or free_ports(1)[0])
        if find_spec("miles.router") is None:
            raise ConfigError("runs that generate need the router: pip install miles-router")
        command = [sys.executable, "-m", "miles.router", "--host", address.host, "--port", str(address.port)]
        command += _router_flags(self._config)
        self._router = ChildProcess(command, log_path=self._logs.log_file("router"), name="router")
        return address


def _at_once(call: Callable[[S], T], each: Sequence[S]) -> list[T]:
    """The results of ``call`` for each, all called at the same time; the first one's error is raised at the end."""
    with ThreadPoolExecutor(max(1, len(each))) as pool:
        return list(pool.map(call, each))


def _router_flags(config: Config) -> list[str]:
    """The run's flags that are the router's as well.  Its own group is known where it is installed."""
    faults, timeout_s = config[FaultTolerance], config[Engines].sglang_router_request_timeout_secs
    values = {
        "--request-timeout-s": config.miles_router_timeout or timeout_s,
        "--max-connections": config.miles_router_max_connections,
        "--health-check-failure-threshold": config.miles_router_health_check_failure_threshold,
        "--health-check-interval-s": faults.rollout_health_check_interval,
        "--health-check-timeout-s": faults.rollout_health_check_timeout,
        "--policy": config.miles_router_policy,
    }
    flags = [text for flag, value in values.items() if value is not None for text in (flag, str(value))]
    middleware = config.miles_router_middleware_paths
    if middleware:
        flags += ["--middleware", *middleware]
    checkpoint = config[Checkpoint].hf_checkpoint
    if checkpoint is not None and (middleware or config.use_session_server):
        flags += ["--tokenizer", checkpoint]
    return flags + sessions.router_flags(config)


def engine_spec(config: Config, index: int, place: EnginePlace, logs: RunDirectory) -> EngineSpec:
    """What engine ``index`` is started with in its ``place``."""
    cluster, rollout = config[Cluster], config[Rollout]
    options = adapter_options(config) | engine_options(config)
    if config[Algorithm].use_rollout_routing_replay:
        options["enable_return_routed_experts"] = True
    checkpoint = config[Checkpoint].hf_checkpoint
    if checkpoint is None:
        raise ConfigError("--hf-checkpoint is not set: the engines load model and tokenizer from it")
    return EngineSpec(
        model_path=checkpoint,
        host=place.host,
        port=place.port,
        index=index,
        seed=config[Algorithm].seed + index,
        num_gpus=cluster.rollout_num_gpus_per_engine if config[Training].device == "cuda" else 0,
        first_gpu=place.first_gpu,
        num_threads=place.num_threads,
        num_nodes=place.num_nodes,
        rendezvous=place.rendezvous,
        part=part_of(config, index),
        bootstrap_port=place.bootstrap_port,
        dtype=str(options.get("dtype", "auto")),
        context_length=rollout.rollout_max_context_len,
        log_path=logs.log_file(f"engine-{index}"),
        releases_memory=bool(cluster.offload_rollout),
        takes_changes=config[Training].update_weight_delta,
        options=options,
    )
