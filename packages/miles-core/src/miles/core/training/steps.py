"""Optimizer steps: forward, loss, backward and update over this rank's micro-batches, the same for actor and critic."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from miles.core.errors import TrainingError
from miles.core.training.columns import Columns
from miles.core.training.loss_batch import LossBatch, LossOutput
from miles.core.training.metric_sums import MetricSums
from miles.core.training.model import Trainable
from miles.core.training.objective import Objective
from miles.core.training.plan import StepPlan
from miles.core.training.ranks import Ranks, process_rank
from miles.core.training.recorder import Recorder
from miles.core.training.schedule import LearningRate
from miles.core.types.batch import RolloutBatch

NonfiniteStep = Literal["stop", "skip"]


class OptimizerSteps:
    """Takes the steps of one model.  ``prefix`` begins the names of its metrics."""

    done: int = 0
    """Steps of the whole run."""

    def __init__(
        self,
        model: Trainable,
        objective: Objective,
        schedule: LearningRate,
        ranks: Ranks,
        device: torch.device,
        *,
        prefix: str = "train/",
        nonfinite: NonfiniteStep = "stop",
        overflow: NonfiniteStep | None = None,
        recomputes: bool = False,
    ) -> None:
        """``nonfinite``: what becomes of a step that is not finite; ``overflow``: the same of one whose loss is finite
        and gradient is not, where a scaled loss makes that a matter of course; ``recomputes``: the loss is computed
        again in the backward pass."""
        self._recomputes = recomputes
        self.schedule = schedule
        self._model = model
        self._objective = objective
        self._ranks = ranks
        self._device = device
        self._prefix = prefix
        self._nonfinite = nonfinite
        self._overflow = nonfinite if overflow is None else overflow

    def take(self, batch: RolloutBatch, step: StepPlan, columns: Columns, recorder: Recorder) -> dict[str, float]:
        """One step; its metrics.  ``recorder`` keeps what the model says.  Collective."""
        denominator = self._objective.denominator(step.mask_sums)
        with_tokens = recorder.output == "logits"
        loss_batches = self._objective.prepare(
            [columns.loss_batch(micro_batch, with_tokens=with_tokens) for micro_batch in step.micro_batches],
            self._ranks.sum,
        )
        sums = MetricSums()
        losses: dict[int, torch.Tensor] = {}

        def loss(number: int, output: Any) -> torch.Tensor:
            recorder.add(step.micro_batches[number], output)
            result = self._evaluated(output, loss_batches[number])
            sums.add(result)
            losses[number] = result.loss.detach()
            return result.loss / denominator

        self._model.accumulate(step.micro_batches, recorder.output, loss)
        sums.expect(*self._ranks.publish(sums.names), device=self._device)
        means = sums.means(denominator=denominator, num_samples=len(step.mask_sums), all_reduce=self._ranks.sum)
        return self._update(means, lambda: self._blame(batch, step, columns, losses, recorder))

    def check_scores(self, what: str, batch: RolloutBatch, columns: Columns, score_A: torch.Tensor) -> None:
        """Name the samples whose scores, of the whole rollout, are not finite.

        That is the end of the run where steps that are not finite are; else the steps on these samples will not be
        taken.
        """
        if bool(torch.isfinite(score_A).all()):
            return
        broken = [batch.sample_indices[i] for i in columns.broken_samples(score_A)]
        why = f"rollout {batch.rollout_id}: {what} that are not finite, of the samples {broken}"
        if self._nonfinite == "stop":
            raise TrainingError(f"{why}. --nonfinite-step skip goes on without steps on them")
        if process_rank() == 0:
            logging.getLogger(__name__).warning("%s", why)

    def _evaluated(self, output: Any, batch: LossBatch) -> LossOutput:
        if not self._recomputes:
            return self._objective(output, batch)
        result: LossOutput = checkpoint(self._objective, output, batch, use_reentrant=False)
        return result

    def _update(self, means: dict[str, float], blame: Callable[[], str]) -> dict[str, float]:
        """Take the step, unless loss or gradient is not finite."""
        rate = self.schedule.at(self.done)
        if not math.isfinite(means["loss"]):
            self._model.drop_gradient()
            return self._refused(f"the loss is {means['loss']}: {blame()}", rate, self._nonfinite)
        grad_norm = self._model.step(rate)
        if not math.isfinite(grad_norm):
            return self._refused(f"the norm of the gradient is {grad_norm}: {blame()}", rate, self._overflow)
        self.done += 1
        metrics = means | {"grad_norm": grad_norm, "lr-pg_0": rate}
        return self._named(metrics if self._overflow == "stop" else metrics | {"skipped": 0.0})

    def _refused(self, why: str, rate: float, policy: NonfiniteStep) -> dict[str, float]:
        """A step that was not taken ends the run, or is told and skipped."""
        if policy == "stop":
            raise TrainingError(f"{why}. --nonfinite-step skip goes on without such steps")
        if process_rank() == 0:
            logging.getLogger(__name__).warning("optimizer step skipped: %s", why)
        return self._named({"skipped": 1.0, "lr-pg_0": rate})

    def _named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {f"{self._prefix}{name}": value for name, value in metrics.items()}

    def _blame(
        self,
        batch: RolloutBatch,
        step: StepPlan,
        columns: Columns,
        losses: Mapping[int, torch.Tensor],
        recorder: Recorder,
    ) -> str:
        """Which samples made a step go wrong, over all ranks.  Collective."""
        culprits = columns.broken_samples(recorder.own_A)
        if not culprits:
            broken = [number for number, loss in losses.items() if not torch.isfinite(loss)]
            culprits = [i for number in broken for i in step.micro_batches[number].samples]
        everyones = sorted({batch.sample_indices[i] for own in self._ranks.gather(culprits) for i in own})
        where = f"rollout {batch.rollout_id}, optimizer step {self.done}"
        if not everyones:
            return f"{where}; every sample's loss is finite, so the backward pass overflowed"
        return f"{where}; it comes from the samples {everyones}"
