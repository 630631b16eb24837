"""PPO's two trainers, driven as one: the critic values what the actor did, then both train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miles.core.driver import checkpoint
from miles.core.driver.export import replaced
from miles.core.driver.weights_only import has_weights_only
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.protocols.backend import Role, TrainReport
from miles.core.training.objective_spec import ObjectiveSpec
from miles.core.types.batch import RolloutBatch
from miles.core.weights.sync import SyncReport

if TYPE_CHECKING:
    from miles.core.config import Config
    from miles.core.driver.executor import ActorGroup, RankGroup


def assemble(config: Config, ranks_of: Callable[[Role], RankGroup]) -> ActorGroup:
    """What trains in a run: the actor's ranks, and the critic's beside them when the algorithm has one."""
    actor = ranks_of("actor")
    return ActorCritic(config, actor, ranks_of("critic")) if config[Algorithm].uses_critic else actor


class ActorCritic:
    """An ``ActorGroup`` with a critic beside the actor.

    The critic's values go to both before they train.  Where the reward penalizes the KL divergence, so do the actor's
    log-probabilities; each then computes the same advantages and returns, and both train at the same time where they
    live in different processes.
    """

    def __init__(self, config: Config, actor: RankGroup, critic: RankGroup) -> None:
        algorithm, flags = config[Algorithm], config[Checkpoint]
        self._actor, self._critic = actor, critic
        self._critic_only = algorithm.num_critic_only_steps
        self._critic_needs_actor = ObjectiveSpec.from_flags(config).penalizes_kl_in_reward
        self._critic_load = _other_run(flags)
        self._critic_save = Path(flags.critic_save) if flags.critic_save is not None else None

    def start(self) -> None:
        """Build both; a critic that ``--critic-load`` finds in another run goes on from there."""
        self._actor.start()
        self._critic.start()
        if self._critic_load is not None and (found := checkpoint.latest(self._critic_load)) is not None:
            self._critic.load(_beside(found.actor))

    def train(self, batch: RolloutBatch) -> TrainReport:
        """Train on one rollout: on the first ``--num-critic-only-steps`` the critic alone."""
        batch = batch.having(self._critic.score(batch))
        if self._critic_needs_actor:
            batch = batch.having(self._actor.score(batch))
        training = [self._critic.begin_train(batch)]
        if batch.rollout_id >= self._critic_only:
            training.append(self._actor.begin_train(batch))
        return _merged([finish() for finish in training])

    def update_weights(self, urls: list[str], version: int) -> SyncReport:
        return self._actor.update_weights(urls, version)

    def repeat_weights(self, urls: list[str], version: int) -> SyncReport:
        return self._actor.repeat_weights(urls, version)

    def probe_engines(self) -> float | None:
        return self._actor.probe_engines()

    def offload(self) -> int:
        return self._actor.offload() + self._critic.offload()

    def onload(self) -> None:
        self._actor.onload()
        self._critic.onload()

    def save(self, directory: Path) -> None:
        """The actor into ``directory``, the critic beside it; and the critic's export."""
        self._actor.save(directory)
        _beside(directory).mkdir()
        self._critic.save(_beside(directory))
        if self._critic_save is not None:
            with replaced(self._critic_save) as fresh:
                self._critic.save_hf(fresh)

    def finish_save(self) -> None:
        self._actor.finish_save()
        self._critic.finish_save()

    def load(self, directory: Path) -> None:
        self._actor.load(directory)
        self._critic.load(_beside(directory))

    def save_hf(self, directory: Path) -> None:
        self._actor.save_hf(directory)

    def close(self) -> None:
        """End both, whatever becomes of the first."""
        try:
            self._critic.close()
        finally:
            self._actor.close()


def _other_run(flags: Checkpoint) -> Path | None:
    """The run whose critic a new run goes on with.  What ``--load`` has is loaded with the actor."""
    load = flags.critic_load
    if load is None or load == flags.load or has_weights_only(Path(load)):
        return None
    return Path(load)


def _beside(actor: Path) -> Path:
    """The critic's directory in the checkpoint whose actor is at ``actor``."""
    return actor.with_name("critic")


def _merged(reports: Sequence[TrainReport]) -> TrainReport:
    """One report of roles that took the same steps."""
    return TrainReport(
        metrics={name: value for report in reports for name, value in report.metrics.items()},
        steps=tuple(
            {name: value for metrics in step for name, value in metrics.items()}
            for step in zip(*(report.steps for report in reports), strict=True)
        ),
        timings={name: seconds for report in reports for name, seconds in report.timings.items()},
    )
