"""One rank of each role on this machine, without Ray: the trainer lives in the driver's own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from miles.core.driver.actor_critic import assemble
from miles.core.driver.threads import train_threads
from miles.core.driver.worker import RoleWorker
from miles.core.protocols.backend import Rank, TrainReport
from miles.core.protocols.rollout import RolloutRole
from miles.core.registry import Registry
from miles.core.types.batch import RolloutBatch
from miles.core.weights.sync import SyncReport

if TYPE_CHECKING:
    from miles.core.config import Config
    from miles.core.driver.executor import ActorGroup

ROLES = Registry("miles.roles")


class LocalRank(RoleWorker):
    """A group of one rank."""

    def start(self) -> None:
        """Build the model, here and now."""
        self.build(Rank(), train_threads(self._training.train_num_threads, 1))

    def begin_train(self, batch: RolloutBatch) -> Callable[[], TrainReport]:
        """Nothing happens before the result is asked for: there is one process."""
        return lambda: self.train(batch)

    def update_weights(self, urls: list[str], version: int) -> SyncReport:
        report = self.send_weights(urls, version, self.served_adapter(urls))
        return self.finish_update(urls, version, report)


class LocalExecutor:
    """Plain calls."""

    def actors(self, config: Config, run_dir: Path) -> ActorGroup:
        return assemble(config, lambda role: LocalRank(config, run_dir, role))

    def rollout(self, config: Config, run_dir: Path) -> RolloutRole:
        role: RolloutRole = ROLES.get("rollout")(config, run_dir)
        return role

    def shutdown(self) -> None:
        """Nothing outlives the roles."""
