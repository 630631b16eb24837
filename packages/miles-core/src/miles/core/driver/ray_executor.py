"""Roles as Ray actors: several ranks, several machines."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles.core.driver.actor_critic import assemble
from miles.core.driver.executor import num_ranks
from miles.core.driver.local_executor import ROLES
from miles.core.driver.ray_engines import RayEngines
from miles.core.driver.ray_places import Places
from miles.core.driver.threads import train_threads
from miles.core.driver.worker import RoleWorker
from miles.core.errors import ConfigError, MilesError
from miles.core.flags.cluster import Cluster
from miles.core.flags.training import Training
from miles.core.ports import free_ports
from miles.core.protocols.backend import Rank, Role, Scores, TrainReport
from miles.core.protocols.rollout import RolloutResult, RolloutRole, RolloutRoleClass
from miles.core.registry import import_from
from miles.core.types.batch import RolloutBatch
from miles.core.weights.sync import SyncReport

if TYPE_CHECKING:
    from miles.core.config import Config
    from miles.core.driver.executor import ActorGroup

CONNECT_DEADLINE_S = 10.0
CLOSING_DEADLINE_S = 30.0
"""For all ranks together, and for the rollout side: after this they are killed."""
DEATH_DEADLINE_S = 5.0
"""How long after an error of one process Ray may take to tell that another one has died, which is the cause then."""
_WRITING = "writing"  # a thread of each rank that waits for checkpoints while another one trains


class RayExecutor:
    """Actors in reserved shares of a cluster: for each rank of a role, for the rollout side, and for its engines."""

    def __init__(self, config: Config) -> None:
        self._config = config
        role: RolloutRoleClass = ROLES.get("rollout")
        self._engines = role.own_engines(config)
        self._owns_ray = not ray.is_initialized()
        self._places: Places | None = None
        if self._owns_ray:
            ray.init(**_ray_options(config[Cluster], len(self._engines)))

    def actors(self, config: Config, run_dir: Path) -> ActorGroup:
        places = self._reserved()
        return assemble(config, lambda role: RayRanks(config, run_dir, role, places.ranks[role], places.gpus_per_rank))

    def rollout(self, config: Config, run_dir: Path) -> RolloutRole:
        places = self._reserved()
        engines = RayEngines(places.engines, host=config.engine_host, num_threads=config.engine_num_threads)
        return RayRollout(config, run_dir.absolute(), places.rollout_side, engines)

    def shutdown(self) -> None:
        """Free the places, and end Ray if it was started here."""
        if self._places is not None:
            self._places.free()
        self._places = None
        if self._owns_ray:
            ray.shutdown()

    def _reserved(self) -> Places:
        """Room for the whole run; ConfigError when there is none, before any of it starts."""
        if self._places is None:
            self._places = Places.reserve(self._config, self._engines)
        return self._places


class RayRanks:
    """Every call goes to all ranks of a role; the first failure ends it."""

    def __init__(
        self, config: Config, run_dir: Path, role: Role, placement: PlacementGroup, gpus_per_rank: float
    ) -> None:
        self._config, self._training = config, config[Training]
        self._ranks = num_ranks(config[Cluster], role)
        self._names = [f"rank {index} of the {role}" for index in range(self._ranks)]
        remote = ray.remote(concurrency_groups={_WRITING: 1})(RoleWorker)
        self._workers = [
            remote.options(
                num_cpus=1,
                num_gpus=gpus_per_rank,
                runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", **self._training.train_env_vars}},
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=index),
            ).remote(config, run_dir.absolute(), role)
            for index in range(self._ranks)
        ]

    def start(self) -> None:
        here = Path.cwd()
        nodes = self._done([worker.__ray_call__.remote(_enter, here) for worker in self._workers])
        (master,) = _first_failure([self._workers[0].__ray_call__.remote(_rendezvous)], self._names[:1])
        ranks_on_node = {node: nodes.count(node) for node in nodes}
        calls = []
        for index, (worker, node) in enumerate(zip(self._workers, nodes, strict=True)):
            rank = Rank(index, self._ranks, nodes[:index].count(node), master)
            calls.append(
                worker.build.remote(rank, train_threads(self._training.train_num_threads, ranks_on_node[node]))
            )
        self._done(calls)

    def score(self, batch: RolloutBatch) -> Scores:
        scores: Scores = self._all("score", ray.put(batch))[0]
        return scores

    def train(self, batch: RolloutBatch) -> TrainReport:
        return self.begin_train(batch)()

    def begin_train(self, batch: RolloutBatch) -> Callable[[], TrainReport]:
        calls = self._begin("train", ray.put(batch))

        def finish() -> TrainReport:
            report: TrainReport = self._done(calls)[0]
            return report

        return finish

    def update_weights(self, urls: list[str], version: int) -> SyncReport:
        (adapter,) = _first_failure([self._workers[0].served_adapter.remote(urls)], self._names[:1])
        report = self._all("send_weights", urls, version, adapter)[0]
        finished: SyncReport = self._all("finish_update", urls, version, report)[0]
        return finished

    def repeat_weights(self, urls: list[str], version: int) -> SyncReport:
        calls = [self._workers[0].repeat_weights.remote(urls, version)]
        report: SyncReport = _first_failure(calls, self._names[:1])[0]
        return report

    def probe_engines(self) -> float | None:
        difference: float | None = self._all("probe_engines")[0]
        return difference

    def offload(self) -> int:
        return sum(self._all("offload"))

    def onload(self) -> None:
        self._all("onload")

    def save(self, directory: Path) -> None:
        self._all("save", directory.absolute())

    def finish_save(self) -> None:
        self._done([worker.finish_save.options(concurrency_group=_WRITING).remote() for worker in self._workers])

    def load(self, directory: Path) -> None:
        self._all("load", directory.absolute())

    def save_hf(self, directory: Path) -> None:
        self._all("save_hf", directory.absolute())

    def close(self) -> None:
        """End every rank, politely first.  Safe to call twice."""
        ray.wait(
            [worker.close.remote() for worker in self._workers],
            num_returns=max(1, len(self._workers)),
            timeout=CLOSING_DEADLINE_S,
        )
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._done(self._begin(method, *arguments))

    def _done(self, calls: list[Any]) -> list[Any]:
        """Results of a call of every rank."""
        return _first_failure(calls, self._names)

    def _begin(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(worker, method).remote(*arguments) for worker in self._workers]


class RayRollout:
    """The rollout role in an actor of its own, called like the local one."""

    def __init__(self, config: Config, run_dir: Path, place: PlacementGroup, engines: RayEngines) -> None:
        # One thread generates, one evaluates, one answers meanwhile.
        options = {"num_cpus": 1, "max_concurrency": 3, "scheduling_strategy": PlacementGroupSchedulingStrategy(place)}
        self._role = ray.remote(_RolloutHost).options(**options).remote(config, run_dir, Path.cwd(), engines)

    def launch(self) -> None:
        self._call("launch")

    def wait_ready(self) -> None:
        self._call("wait_ready")

    def generates_continuously(self) -> bool:
        continuously: bool = self._call("generates_continuously")
        return continuously

    def num_rollouts_per_epoch(self) -> int | None:
        count: int | None = self._call("num_rollouts_per_epoch")
        return count

    def generate(self, rollout_id: int) -> RolloutResult:
        result: RolloutResult = self._call("generate", rollout_id)
        return result

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        metrics: dict[str, float] = self._call("evaluate", rollout_id)
        return metrics

    def engine_urls(self) -> list[str]:
        urls: list[str] = self._call("engine_urls")
        return urls

    def progress(self) -> str | None:
        how_far: str | None = self._call("progress")
        return how_far

    def check_alive(self) -> None:
        self._call("check_alive")

    def engines_waiting(self) -> list[str]:
        urls: list[str] = self._call("engines_waiting")
        return urls

    def weights_updating(self) -> None:
        self._call("weights_updating")

    def weights_updated(self, version: int, urls: Sequence[str]) -> None:
        self._call("weights_updated", version, list(urls))

    def release_memory(self, tags: Sequence[str]) -> int:
        freed: int = self._call("release_memory", list(tags))
        return freed

    def resume_memory(self, tags: Sequence[str]) -> None:
        self._call("resume_memory", list(tags))

    def replace_engine(self, url: str, reason: str) -> None:
        self._call("replace_engine", url, reason)

    def save(self, directory: Path) -> None:
        self._call("save", directory.absolute())

    def load(self, directory: Path) -> None:
        self._call("load", directory.absolute())

    def stop(self) -> None:
        """Stop the role's processes, then its actor.  Safe to call twice."""
        if self._role is None:
            return
        with suppress(ray.exceptions.RayError, TimeoutError):  # it is about to be killed
            ray.get(self._role.call.remote("stop", ()), timeout=CLOSING_DEADLINE_S)
        ray.kill(self._role)
        self._role = None

    def _call(self, method: str, *arguments: Any) -> Any:
        return _first_failure([self._role.call.remote(method, arguments)], ["the rollout side"])[0]


class _RolloutHost:
    """Holds the role inside its Ray actor: the class comes from the registry there, not from the driver's pickle."""

    def __init__(self, config: Config, run_dir: Path, working_directory: Path, engines: RayEngines) -> None:
        _stand_in(working_directory)
        self._role: RolloutRole = ROLES.get("rollout")(config, run_dir, engines)

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._role, method)(*arguments)


def _first_failure(calls: list[Any], who: Sequence[str]) -> list[Any]:
    """Results in order; raises as soon as one call fails, without waiting for ranks that hang because of it.

    ``who`` names the process of each call.
    """
    pending = list(calls)
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            if isinstance(cause, MilesError):
                raise cause from error
            if (dead := _first_dead(calls, DEATH_DEADLINE_S)) is not None:
                raise _told_dead(calls, who, *dead) from None
            raise
        except ray.exceptions.RayActorError as error:
            raise _told_dead(calls, who, done[0], error) from None
    return list(ray.get(calls))


def _first_dead(calls: list[Any], deadline_s: float) -> tuple[Any, ray.exceptions.RayActorError] | None:
    """The first call whose process has died, and what Ray says of it: others fail because it no longer answers them."""
    ended, _ = ray.wait(calls, num_returns=len(calls), timeout=deadline_s)
    for call in ended:
        try:
            ray.get(call)
        except ray.exceptions.RayActorError as error:
            return call, error
        except ray.exceptions.RayTaskError:
            continue
    return None


def _told_dead(calls: list[Any], who: Sequence[str], call: Any, error: ray.exceptions.RayActorError) -> MilesError:
    name = who[calls.index(call)]
    if error.actor_init_failed:
        return MilesError(f"{name} could not be started: {error}")
    return MilesError(
        f"{name} has died: {error}. Start the run again with the same command: it goes on from its last checkpoint"
    )


def _enter(worker: RoleWorker, working_directory: Path) -> str:
    """In a rank: stand where the driver stands, so that relative paths mean the same; its node's id."""
    _stand_in(working_directory)
    return str(ray.get_runtime_context().get_node_id())


def _stand_in(working_directory: Path) -> None:
    os.chdir(working_directory)
    import_from(working_directory)


def _rendezvous(worker: RoleWorker) -> str:
    """In rank 0: ``host:port`` under which the other nodes reach it, with a free port."""
    host = ray.util.get_node_ip_address()
    return f"{host}:{free_ports(1, host)[0]}"


def _ray_options(cluster: Cluster, num_engines: int) -> dict[str, Any]:
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": True, "logging_level": "warning"}
    if cluster.ray_address:
        _check_reachable(cluster.ray_address)
        return {**options, "address": cluster.ray_address}
    # Ray's CPUs only count who may start; thread counts are set per role, so a small machine still holds every role.
    processes = num_ranks(cluster, "actor") + num_ranks(cluster, "critic") + 1 + num_engines
    # Without an address Ray would look for a cluster that somebody else has started on this machine.
    return {**options, "address": "local", "num_cpus": max(os.cpu_count() or 1, processes)}


def _check_reachable(address: str) -> None:
    """ConfigError when nobody listens at ``host:port``: Ray itself tries for minutes before it says so."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or "/" in host:  # `auto`, or the address of a Ray client
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_DEADLINE_S).close()
    except OSError as error:
        raise ConfigError(
            f"--ray-address {address}: nobody answers there ({error}). `ray status` on the head node tells it; "
            "without --ray-address a cluster is started on this machine"
        ) from None
