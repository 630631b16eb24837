"""Where everything of a run goes in a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles.core.driver.executor import num_ranks
from miles.core.driver.ray_engines import Seat
from miles.core.driver.ray_room import Want, node_resources, place, problems
from miles.core.errors import ConfigError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.cluster import Cluster
from miles.core.flags.debug import Debug
from miles.core.flags.training import Training
from miles.core.protocols.backend import Role

if TYPE_CHECKING:
    from miles.core.config import Config


@dataclass(frozen=True, slots=True)
class Places:
    """Reserved shares of the cluster."""

    ranks: Mapping[Role, PlacementGroup]
    """A bundle for each rank."""
    engines: Mapping[int, Sequence[Seat]]
    """By index of the engine: a seat on each of its nodes."""
    rollout_side: PlacementGroup
    gpus_per_rank: float
    _reserved: ExitStack

    @classmethod
    def reserve(cls, config: Config, engines: Sequence[int]) -> Places:
        """Everything that a run with engines of these indices needs.

        ConfigError when the cluster has no room for it, or others do not leave it.
        """
        layout = EngineLayout.of(config)
        shared, own = layout.shared(engines), layout.own(engines)
        wanted = {role: _ranks(config, role, layout.gpus_per_rank) for role in _roles(config)}
        rollout_side = Want("the rollout side", {"CPU": 1.0}, 1)
        wants = [layout.want(len(own)), *wanted.values(), rollout_side]
        if found := problems([want for want in wants if want.count], node_resources()):
            raise ConfigError(*found)
        with ExitStack() as reserved:
            seats: dict[int, Sequence[Seat]] = {}
            if own:
                seats |= layout.seated(own, layout.seats_of(_kept(wants[0], reserved)))
            ranks = {role: _kept(want, reserved) for role, want in wanted.items()}
            if shared:
                seats |= layout.seated(shared, layout.seats_among(ranks["actor"]))
            place_of_rollout = _kept(rollout_side, reserved)
            return cls(ranks, seats, place_of_rollout, layout.gpus_per_rank, reserved.pop_all())

    def free(self) -> None:
        """Give everything back; what runs there ends.  Safe to call twice."""
        self._reserved.close()


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """How engines lie in the cluster."""

    gpus_per_rank: float
    """Of the trainer; 0 on CPUs."""
    num_shared: int
    """Engines, the first ones, that have the actor's accelerators."""
    nodes_per_engine: int
    gpus_per_node: int
    """Of one engine; 0 on CPUs."""
    flags: str
    """For people: what was asked for."""

    @classmethod
    def of(cls, config: Config) -> EngineLayout:
        cluster = config[Cluster]
        per_engine = cluster.rollout_num_gpus_per_engine
        if config[Training].device == "cpu":
            return cls(0.0, 0, 1, 0, "--rollout-num-engines")
        nodes = max(1, per_engine // cluster.num_gpus_per_node)
        shares = cluster.colocate and not config[Debug].debug_rollout_only
        return cls(
            1.0,
            num_ranks(cluster) // per_engine if shares else 0,
            nodes,
            per_engine // nodes,
            f"--rollout-num-gpus / --rollout-num-gpus-per-engine {per_engine}",
        )

    def shared(self, engines: Sequence[int]) -> list[int]:
        """Those of ``engines`` that have the actor's accelerators."""
        return [index for index in engines if index < self.num_shared]

    def own(self, engines: Sequence[int]) -> list[int]:
        """Those that have some of their own."""
        return [index for index in engines if index >= self.num_shared]

    def want(self, num_engines: int) -> Want:
        """What that many engines need that share nothing.  Those on CPUs go where cores are."""
        bundle = {"CPU": 1.0, "GPU": float(self.gpus_per_node)}
        return Want(
            f"engines ({self.flags})", bundle, num_engines * self.nodes_per_engine, spread=not self.gpus_per_node
        )

    def seats_of(self, group: PlacementGroup) -> list[Seat]:
        """Places of engines, one bundle each."""
        return [Seat(group, bundle, float(self.gpus_per_node)) for bundle in range(group.bundle_count)]

    def seats_among(self, ranks: PlacementGroup) -> list[Seat]:
        """Places of engines among the ranks' bundles of one accelerator: as many as an engine has on a node."""
        on_node: dict[str, list[tuple[str, int]]] = {}
        for bundle, (node, gpu) in enumerate(_accelerators(ranks)):
            on_node.setdefault(node, []).append((gpu, bundle))
        size = self.gpus_per_node
        return [
            Seat(ranks, chunk[0][1], gpus=tuple(gpu for gpu, _ in chunk))
            for node in sorted(on_node)
            for chunk in _chunks(sorted(on_node[node]), size)
        ]

    def seated(self, engines: Sequence[int], seats: Sequence[Seat]) -> dict[int, Sequence[Seat]]:
        """Seats for each engine; ConfigError when there are too few of them."""
        if len(seats) < len(engines) * self.nodes_per_engine:
            raise ConfigError(
                f"{self.flags}: {len(engines)} engines share the accelerators of the actor, which lie on nodes of the "
                f"Ray cluster where {len(seats) // self.nodes_per_engine} have room. Expected "
                "--actor-num-gpus-per-node to be what a node has, and a multiple of what an engine has there"
            )
        rest = iter(seats)
        return {index: list(islice(rest, self.nodes_per_engine)) for index in engines}


def _roles(config: Config) -> list[Role]:
    if config[Debug].debug_rollout_only:
        return []
    return ["actor", "critic"] if config[Algorithm].uses_critic else ["actor"]


def _ranks(config: Config, role: Role, gpus: float) -> Want:
    name = f"ranks (--{role}-num-nodes x --{role}-num-gpus-per-node)"
    return Want(name, {"CPU": 1.0, "GPU": gpus}, num_ranks(config[Cluster], role))


def _kept(want: Want, reserved: ExitStack) -> PlacementGroup:
    group = place(want)
    reserved.callback(remove_placement_group, group)
    return group


def _accelerators(group: PlacementGroup) -> list[tuple[str, str]]:
    """The node and the accelerator of each bundle, which has one."""
    ask = ray.remote(_accelerator)
    return list(
        ray.get(
            [
                ask.options(
                    num_cpus=1,
                    num_gpus=1,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
                ).remote()
                for bundle in range(group.bundle_count)
            ]
        )
    )


def _accelerator() -> tuple[str, str]:
    """In a bundle."""
    (gpu,) = ray.get_gpu_ids()
    return ray.get_runtime_context().get_node_id(), str(gpu)


def _chunks(items: Sequence[tuple[str, int]], size: int) -> Iterator[Sequence[tuple[str, int]]]:
    """Whole ones."""
    return (items[start : start + size] for start in range(0, len(items) - size + 1, size))
