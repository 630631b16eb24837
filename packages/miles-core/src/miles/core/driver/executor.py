"""Where roles run: the same classes, in this process or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from miles.core.flags.cluster import Cluster
from miles.core.protocols.backend import Role, Scores, TrainReport
from miles.core.protocols.rollout import RolloutRole
from miles.core.types.batch import RolloutBatch

if TYPE_CHECKING:
    from miles.core.config import Config
    from miles.core.weights.sync import SyncReport


class ActorGroup(Protocol):
    """Everything that trains, driven as one: the ranks of the actor, and those of a critic if there is one."""

    def start(self) -> None:
        """Build the model on every rank; return when all are ready."""

    def train(self, batch: RolloutBatch) -> TrainReport: ...

    def update_weights(self, urls: list[str], version: int) -> SyncReport:
        """Bring the engines to the actor's weights."""

    def repeat_weights(self, urls: list[str], version: int) -> SyncReport:
        """Bring further engines to ``version``, which the others took last, whatever the actor has learned since.

        Only where a run replaces engines while the trainer's own weights are not to be had.
        """

    def probe_engines(self) -> float | None:
        """Ask the engines of the last update for a fixed prompt's log-probabilities, if that was due: the difference.

        WeightSyncError when they are not what the trainer computes.
        """

    def offload(self) -> int:
        """Move everything to host memory; the bytes of accelerators that this frees."""

    def onload(self) -> None:
        """Undo ``offload``."""

    def save(self, directory: Path) -> None: ...

    def finish_save(self) -> None:
        """Return when what ``save`` began is on disk.  Called from another thread while the group trains."""

    def load(self, directory: Path) -> None: ...

    def save_hf(self, directory: Path) -> None: ...

    def close(self) -> None: ...


class RankGroup(ActorGroup, Protocol):
    """All ranks of the actor, or all of the critic."""

    def score(self, batch: RolloutBatch) -> Scores: ...

    def begin_train(self, batch: RolloutBatch) -> Callable[[], TrainReport]:
        """Set the ranks to work, where they are processes of their own; the result is what finishes it."""


class Executor(Protocol):
    """Creates the roles of a run and ends them."""

    def actors(self, config: Config, run_dir: Path) -> ActorGroup: ...

    def rollout(self, config: Config, run_dir: Path) -> RolloutRole: ...

    def shutdown(self) -> None: ...


def choose(cluster: Cluster) -> Literal["local", "ray"]:
    """The executor of ``--executor``; ``auto`` takes Ray when a role has several ranks or a cluster is named."""
    if cluster.executor != "auto":
        return cluster.executor
    several = max(num_ranks(cluster, "actor"), num_ranks(cluster, "critic")) > 1
    return "ray" if several or cluster.ray_address else "local"


def num_ranks(cluster: Cluster, role: Role = "actor") -> int:
    """Ranks of a role."""
    if role == "critic":
        return cluster.critic_num_nodes * cluster.critic_num_gpus_per_node
    return cluster.actor_num_nodes * cluster.actor_num_gpus_per_node


def create(config: Config) -> Executor:
    """The chosen executor.  Ray is imported only when it is used."""
    if choose(config[Cluster]) == "ray":
        from miles.core.driver.ray_executor import RayExecutor

        return RayExecutor(config)
    from miles.core.driver.local_executor import LocalExecutor

    return LocalExecutor()
