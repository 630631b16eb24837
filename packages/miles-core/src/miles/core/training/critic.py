"""PPO's critic: values of a rollout's tokens, and optimizer steps towards its returns.  Shared by all backends."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from miles.core.flags.algorithm import Algorithm
from miles.core.flags.data import Data
from miles.core.flags.hooks import Hooks
from miles.core.flags.optimizer import Optimizer
from miles.core.protocols.backend import Scores, TrainReport
from miles.core.training.ci import GradNorms
from miles.core.training.clock import PhaseClock
from miles.core.training.columns import Columns
from miles.core.training.model import ValueModel
from miles.core.training.objective import build_advantages, build_objective
from miles.core.training.objective_spec import ObjectiveSpec
from miles.core.training.procedure import Procedure
from miles.core.training.ranks import Ranks, process_rank
from miles.core.training.recorder import Recorder
from miles.core.training.settings import critic_learning_rate
from miles.core.types.batch import RolloutBatch

if TYPE_CHECKING:
    from miles.core.config import Config


class CriticTrainer(Procedure):
    """Values and optimizer steps of the critic, rollout after rollout."""

    def __init__(self, config: Config, model: ValueModel, *, ranks: Ranks, device: torch.device) -> None:
        algorithm, data = config[Algorithm], config[Data]
        spec = ObjectiveSpec.from_flags(config)
        super().__init__(
            config,
            model,
            build_objective(spec, config, role="critic"),
            critic_learning_rate(algorithm, config[Optimizer], data),
            ranks=ranks,
            device=device,
            prefix="train/critic-",
        )
        self._model = model
        # Distillation changes the actor's advantages alone, not what the critic predicts.
        self._advantages = build_advantages(replace(spec, use_opd=False))
        self._grad_norms = GradNorms(config[Hooks], "critic")

    def score(self, batch: RolloutBatch) -> Scores:
        """``values`` of every response token.  Collective."""
        columns = Columns.of(batch, self._device)
        recorder = Recorder(columns, self._ranks, "values")
        micro_batches = [micro_batch for step in self._plan(batch) for micro_batch in step.micro_batches]
        for micro_batch, value_T in zip(micro_batches, self._model.values(micro_batches), strict=True):
            recorder.add(micro_batch, value_T)
        value_A = recorder.everyones()
        self._steps.check_scores("values of the critic", batch, columns, value_A)
        return {"values": columns.per_sample(value_A)}

    def train(self, batch: RolloutBatch) -> TrainReport:
        """Train on one rollout whose ``values`` are known.  Collective; every rank passes the whole rollout."""
        clock = PhaseClock()
        with clock.phase("critic_train"):
            steps = self._plan(batch)
            columns = Columns.of(batch, self._device)
            columns.take_advantages(self._advantages(columns.advantage_inputs()))
            if self._fresh_optimizer:
                self._model.reset_optimizer()
            recorder = Recorder(columns, self._ranks, "values")
            metrics = tuple(self._steps.take(batch, step, columns, recorder) for step in steps)
        if process_rank() == 0:
            self._grad_norms.take(batch.rollout_id, [step.get("train/critic-grad_norm", 0.0) for step in metrics])
        return TrainReport(metrics=columns.means() | _quality(columns), steps=metrics, timings=clock.seconds)


def _quality(columns: Columns) -> dict[str, float]:
    """Share of the variance of returns that the values explain: 1 is perfect, 0 no better than a constant."""
    assert columns.value_A is not None
    assert columns.return_A is not None
    kept = columns.mask_A != 0
    returns, errors = columns.return_A[kept].double(), (columns.return_A - columns.value_A)[kept].double()
    variance = returns.var(correction=0) if len(returns) else torch.zeros(())
    if variance == 0:
        return {}
    return {"rollout/value_explained_variance": float(1.0 - errors.var(correction=0) / variance)}
