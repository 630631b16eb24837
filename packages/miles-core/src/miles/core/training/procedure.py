"""What training of the actor and of the critic have in common."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from miles.core.flags.algorithm import Algorithm
from miles.core.flags.data import Data
from miles.core.flags.debug import Debug
from miles.core.flags.optimizer import Optimizer
from miles.core.flags.training import Training
from miles.core.training.model import Trainable
from miles.core.training.objective import Objective
from miles.core.training.plan import StepPlan, plan_rollout
from miles.core.training.ranks import Ranks
from miles.core.training.schedule import LearningRate
from miles.core.training.settings import packing
from miles.core.training.state_files import Counters
from miles.core.training.steps import OptimizerSteps
from miles.core.types.batch import RolloutBatch

if TYPE_CHECKING:
    from miles.core.config import Config


class Procedure:
    """Where training stands, and how a rollout becomes optimizer steps.  ``prefix`` begins the names of metrics."""

    def __init__(
        self,
        config: Config,
        model: Trainable,
        objective: Objective,
        schedule: LearningRate,
        *,
        ranks: Ranks,
        device: torch.device,
        prefix: str = "train/",
    ) -> None:
        data, training = config[Data], config[Training]
        self._ranks = ranks
        self._device = device
        self._packing = packing(data)
        self._samples_per_step = None if config.use_dynamic_global_batch_size else data.global_batch_size
        self._fresh_optimizer = config[Algorithm].reset_optimizer_states
        self._steps = OptimizerSteps(
            model,
            objective,
            schedule,
            ranks,
            device,
            prefix=prefix,
            nonfinite=config[Debug].nonfinite_step,
            overflow="skip" if training.train_dtype == "fp16" else None,
            recomputes=training.recompute_loss_function,
        )

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the whole run."""
        return self._steps.done

    @steps_done.setter
    def steps_done(self, count: int) -> None:
        self._steps.done = count

    @property
    def schedule(self) -> LearningRate:
        """The learning rate as a function of ``steps_done``."""
        return self._steps.schedule

    @schedule.setter
    def schedule(self, schedule: LearningRate) -> None:
        self._steps.schedule = schedule

    def counters(self, *, world_size: int, has_optimizer: bool) -> Counters:
        """Where training stands, for a state that ``world_size`` ranks save."""
        return Counters(
            steps_done=self.steps_done,
            world_size=world_size,
            has_optimizer=has_optimizer,
            schedule=asdict(self.schedule),
            kept_versions=self._kept_versions(),
        )

    def _kept_versions(self) -> tuple[int, ...]:
        """Older weights that are part of the state."""
        return ()

    def go_on_from(self, counters: Counters, flags: Optimizer) -> None:
        """Stand where ``counters`` say."""
        self.steps_done = counters.steps_done
        self.schedule = counters.resumed_schedule(self.schedule, flags)

    def _plan(self, batch: RolloutBatch) -> tuple[StepPlan, ...]:
        samples_per_step = self._samples_per_step or len(batch)
        return plan_rollout(batch, samples_per_step, self._packing, self._ranks, self._device)
