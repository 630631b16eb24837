"""One rank of each role on this machine, without Ray: the trainer lives in the driver's own process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from miles.core.driver.threads import train_threads
from miles.core.driver.worker import ActorWorker
from miles.core.flags.cluster import Cluster
from miles.core.protocols.backend import Rank
from miles.core.protocols.rollout import RolloutRole
from miles.core.registry import Registry

if TYPE_CHECKING:
    from miles.core.config import Config

ROLES = Registry("miles.roles")


class LocalActors(ActorWorker):
    """A group of one rank."""

    def start(self) -> None:
        """Build the model, here and now."""
        self.build(Rank(), train_threads(self._training.train_num_threads, 1))


class LocalExecutor:
    """Plain calls."""

    def __init__(self, cluster: Cluster) -> None:
        del cluster

    def actors(self, config: Config, run_dir: Path) -> LocalActors:
        return LocalActors(config, run_dir)

    def rollout(self, config: Config, run_dir: Path) -> RolloutRole:
        role: RolloutRole = ROLES.get("rollout")(config, run_dir)
        return role

    def shutdown(self) -> None:
        """Nothing outlives the roles."""
