"""Where roles run: the same classes, in this process or on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from miles.core.flags.cluster import Cluster
from miles.core.protocols.backend import TrainReport
from miles.core.protocols.rollout import RolloutRole
from miles.core.types.batch import RolloutBatch
from miles.core.weights.sync import SyncReport

if TYPE_CHECKING:
    from miles.core.config import Config


class ActorGroup(Protocol):
    """All ranks of the actor, driven as one."""

    def start(self) -> None:
        """Build the model on every rank; return when all are ready."""

    def train(self, batch: RolloutBatch) -> TrainReport: ...

    def update_weights(self, urls: list[str], version: int) -> SyncReport: ...

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...

    def save_hf(self, directory: Path) -> None: ...

    def close(self) -> None: ...


class Executor(Protocol):
    """Creates the roles of a run and ends them."""

    def actors(self, config: Config, run_dir: Path) -> ActorGroup: ...

    def rollout(self, config: Config, run_dir: Path) -> RolloutRole: ...

    def shutdown(self) -> None: ...


def choose(cluster: Cluster) -> Literal["local", "ray"]:
    """The executor of ``--executor``; ``auto`` takes Ray when a role has several ranks or a cluster is named."""
    if cluster.executor != "auto":
        return cluster.executor
    return "ray" if num_ranks(cluster) > 1 or cluster.ray_address else "local"


def num_ranks(cluster: Cluster) -> int:
    """Ranks of the actor."""
    return cluster.actor_num_nodes * cluster.actor_num_gpus_per_node


def create(cluster: Cluster) -> Executor:
    """The chosen executor.  Ray is imported only when it is used."""
    if choose(cluster) == "ray":
        from miles.core.driver.ray_executor import RayExecutor

        return RayExecutor(cluster)
    from miles.core.driver.local_executor import LocalExecutor

    return LocalExecutor(cluster)
