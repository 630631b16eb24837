"""Shares of a Ray cluster: asked for all together before a process starts, so that what has no room is told then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from miles.core.errors import ConfigError

PLACEMENT_DEADLINE_S = 300.0
Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Want:
    """What some processes of a run need."""

    name: str
    """For people: the flags that ask for it, and what they come to."""
    bundle: Resources
    """Of one process, which has all of it on one node; zeros count for nothing."""
    count: int
    spread: bool = False
    """Over as many nodes as there are; otherwise over as few as possible."""

    @property
    def needs(self) -> dict[str, float]:
        return {resource: amount for resource, amount in self.bundle.items() if amount}


def node_resources() -> list[dict[str, float]]:
    """What each node of the cluster has, whoever uses it."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def problems(wants: Sequence[Want], nodes: Sequence[Resources]) -> list[str]:
    """Why the cluster cannot hold ``wants``, however long one waits."""
    return list(_too_many(wants, nodes)) or list(_too_much(wants, nodes))


def place(want: Want) -> PlacementGroup:
    """Reserve it; ConfigError when others do not leave room for it in time."""
    group = placement_group([want.needs] * want.count, strategy="SPREAD" if want.spread else "PACK")
    if not group.wait(PLACEMENT_DEADLINE_S):
        remove_placement_group(group)
        raise ConfigError(
            f"{want.name} {want.count} x {_told(want.needs)}: the Ray cluster has {ray.cluster_resources()}, and "
            f"{ray.available_resources()} of it is free"
        )
    return group


def nodes_of(group: PlacementGroup) -> list[str]:
    """The id of each bundle's node."""
    bundles: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return [bundles[index] for index in range(len(bundles))]


def _too_many(wants: Sequence[Want], nodes: Sequence[Resources]) -> Iterator[str]:
    """Processes that do not fit on the nodes, whatever else is there."""
    for want in wants:
        room = sum(_times(want.needs, node) for node in nodes)
        if want.count > room:
            asked = f"{want.name} {want.count} x {_told(want.needs)}"
            yield f"{asked}: the Ray cluster has room for {room} ({_those(nodes)})"


def _too_much(wants: Sequence[Want], nodes: Sequence[Resources]) -> Iterator[str]:
    """What all of them take together."""
    for resource in sorted({resource for want in wants for resource in want.needs}):
        parts = {want.name: want.count * want.needs[resource] for want in wants if resource in want.needs}
        needed, present = sum(parts.values()), sum(node.get(resource, 0.0) for node in nodes)
        if needed > present:
            told = ", ".join(f"{amount:g} for {name}" for name, amount in parts.items())
            yield (
                f"this run takes {needed:g} {resource} of Ray's, and the cluster has {present:g} "
                f"({_those(nodes)}): {told}"
            )


def _times(needs: Resources, node: Resources) -> int:
    """How often a node has it."""
    return min(int(node.get(resource, 0.0) // amount) for resource, amount in needs.items())


def _told(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {resource}" for resource, amount in resources.items())


def _those(nodes: Sequence[Resources]) -> str:
    """Each node's share of what runs ask for."""
    shares = (
        _told({resource: node[resource] for resource in ("CPU", "GPU") if node.get(resource)}) or "nothing"
        for node in nodes
    )
    return f"nodes with {'; '.join(shares)}"
