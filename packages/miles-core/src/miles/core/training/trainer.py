"""Training on one rollout: the procedure that all backends share.

The whole rollout is known to every rank.  A rank computes the log-probabilities of its own samples; they are exchanged,
so that everyone computes advantages, whitening and metrics on the whole rollout, and nothing depends on who had what.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from miles.core.advantages.estimate import AdvantageInputs
from miles.core.errors import TrainingError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.data import Data
from miles.core.flags.optimizer import Optimizer
from miles.core.math.logprobs import LogProbs
from miles.core.protocols.backend import TrainReport
from miles.core.training.clock import PhaseClock
from miles.core.training.columns import Columns, batch_means
from miles.core.training.metric_sums import MetricSums
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.model import Model, Output, Scorer
from miles.core.training.objective import build_advantages, build_objective
from miles.core.training.objective_spec import Needs, ObjectiveSpec, required_inputs
from miles.core.training.plan import StepPlan, plan_rollout
from miles.core.training.ranks import Ranks
from miles.core.training.settings import cap_warning, learning_rate, packing
from miles.core.types.batch import RolloutBatch

if TYPE_CHECKING:
    from miles.core.config import Config


class RolloutTrainer:
    """Scores, advantages and optimizer steps of the actor, rollout after rollout."""

    steps_done: int = 0
    """Optimizer steps of the whole run."""

    def __init__(
        self, config: Config, model: Model, *, reference: Scorer | None, ranks: Ranks, device: torch.device
    ) -> None:
        algorithm, data = config[Algorithm], config[Data]
        spec = ObjectiveSpec.from_flags(config)
        self._schedule = learning_rate(config[Optimizer], data)
        self._model = model
        self._reference = reference
        self._ranks = ranks
        self._device = device
        self._packing = packing(data)
        if ranks.index == 0 and (
            warning := cap_warning(data, config.rollout_max_prompt_len, config.rollout_max_response_len)
        ):
            logging.getLogger(__name__).warning(warning)
        self._samples_per_step = None if config.use_dynamic_global_batch_size else data.global_batch_size
        self._objective = build_objective(spec, config)
        self._estimator = build_advantages(spec) if algorithm.compute_advantages_and_returns else None
        self._needs = {one: required_inputs(spec, one_step=one) for one in (True, False)}
        self._log_entropy = algorithm.use_rollout_entropy
        self._fresh_optimizer = algorithm.reset_optimizer_states

    def train(self, batch: RolloutBatch) -> TrainReport:
        """Train on one rollout.  Collective; every rank passes the whole rollout."""
        clock = PhaseClock()
        with clock.phase("data_preprocess"):
            samples_per_step = self._samples_per_step or len(batch)
            steps = plan_rollout(batch, samples_per_step, self._packing, self._ranks, self._device)
            columns = Columns.of(batch, self._device)
        self._add_scores(batch, steps, columns, clock)
        self._add_advantages(columns)
        if self._fresh_optimizer:
            self._model.reset_optimizer()
        with clock.phase("actor_train"):
            metrics = self._train_steps(batch, steps, columns)
        tokens = sum(batch.total_lengths)
        means = batch_means(batch) | columns.means()
        means["perf/actor_train_tok_per_s"] = tokens / clock.seconds["actor_train"]
        return TrainReport(metrics=means, steps=tuple(metrics), timings=clock.seconds)

    def _add_scores(self, batch: RolloutBatch, steps: Sequence[StepPlan], columns: Columns, clock: PhaseClock) -> None:
        """Log-probabilities that must be known before the first step."""
        needs = self._needs[len(steps) == 1]
        _check_columns(batch, needs)
        if needs.ref_logp:
            assert self._reference is not None
            with clock.phase("ref_log_probs"):
                columns.ref_logp_A, _ = self._scores(batch, steps, columns, self._reference)
        if needs.old_logp:
            with clock.phase("log_probs"):
                columns.old_logp_A, columns.entropy_A = self._scores(
                    batch, steps, columns, self._model, with_entropy=self._log_entropy
                )

    def _scores(
        self,
        batch: RolloutBatch,
        steps: Sequence[StepPlan],
        columns: Columns,
        model: Scorer,
        *,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores of the whole rollout, in the very micro-batches of training."""
        recorder = _Recorder(columns, self._ranks, with_entropy=with_entropy)
        micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
        for micro_batch, scores in zip(
            micro_batches, model.score(micro_batches, with_entropy=with_entropy), strict=True
        ):
            recorder.add(micro_batch, scores)
        logp_A, entropy_A = recorder.result()
        if not torch.isfinite(logp_A).all():
            raise TrainingError(
                f"rollout {batch.rollout_id}: log-probabilities that are not finite, of the samples "
                f"{[batch.sample_indices[i] for i in columns.broken_samples(logp_A)]}"
            )
        return logp_A, entropy_A

    def _add_advantages(self, columns: Columns) -> None:
        if self._estimator is None:
            return
        result = self._estimator(
            AdvantageInputs(
                layout=columns.layout,
                mask_A=columns.mask_A,
                reward_S=columns.reward_S,
                old_logp_A=columns.old_logp_A,
                rollout_logp_A=columns.rollout_logp_A,
                ref_logp_A=columns.ref_logp_A,
                teacher_logp_A=columns.teacher_logp_A,
            )
        )
        columns.advantage_A, columns.return_A = result.advantage_A, result.return_A

    def _train_steps(self, batch: RolloutBatch, steps: Sequence[StepPlan], columns: Columns) -> list[dict[str, float]]:
        """All optimizer steps.  The scores of a single step are those of the old policy, if nobody asked before."""
        with_entropy = self._needs[True].entropy or (self._log_entropy and columns.old_logp_A is None)
        recorder = _Recorder(columns, self._ranks, with_entropy=with_entropy)
        metrics = [self._step(batch, step, columns, recorder) for step in steps]
        if len(steps) == 1 and columns.old_logp_A is None and self._objective.consumes == "logprobs":
            columns.old_logp_A, columns.entropy_A = recorder.result()
        return metrics

    def _step(self, batch: RolloutBatch, step: StepPlan, columns: Columns, recorder: _Recorder) -> dict[str, float]:
        denominator = self._objective.denominator(step.mask_sums)
        on_logits = self._objective.consumes == "logits"
        loss_batches = self._objective.prepare(
            [columns.loss_batch(micro_batch, with_tokens=on_logits) for micro_batch in step.micro_batches],
            self._ranks.sum,
        )
        sums = MetricSums()
        losses: dict[int, torch.Tensor] = {}

        def loss(number: int, output: Any) -> torch.Tensor:
            if not on_logits:
                recorder.add(step.micro_batches[number], output)
            result = self._objective(output, loss_batches[number])
            sums.add(result)
            losses[number] = result.loss.detach()
            return result.loss / denominator

        output: Output = "logits" if on_logits else "entropy" if recorder.with_entropy else "logprobs"
        self._model.accumulate(step.micro_batches, output, loss)
        sums.expect(*self._ranks.publish(sums.names), device=self._device)
        means = sums.means(denominator=denominator, num_samples=len(step.mask_sums), all_reduce=self._ranks.sum)
        return self._update(means, lambda: self._blame(batch, step, columns, losses, recorder))

    def _update(self, means: dict[str, float], blame: Callable[[], str]) -> dict[str, float]:
        """Take the optimizer step, unless loss or gradient is not finite."""
        if not math.isfinite(means["loss"]):
            raise TrainingError(f"the loss is {means['loss']}: {blame()}")
        rate = self._schedule.at(self.steps_done)
        grad_norm = self._model.step(rate)
        if not math.isfinite(grad_norm):
            raise TrainingError(f"the norm of the gradient is {grad_norm}: {blame()}")
        self.steps_done += 1
        return {f"train/{name}": value for name, value in means.items()} | {
            "train/grad_norm": grad_norm,
            "train/lr-pg_0": rate,
        }

    def _blame(
        self,
        batch: RolloutBatch,
        step: StepPlan,
        columns: Columns,
        losses: Mapping[int, torch.Tensor],
        recorder: _Recorder,
    ) -> str:
        """Which samples made a step go wrong, over all ranks.  Collective."""
        culprits = columns.broken_samples(recorder.own_logp_A)
        if not culprits:
            broken = [number for number, loss in losses.items() if not torch.isfinite(loss)]
            culprits = [i for number in broken for i in step.micro_batches[number].samples]
        everyones = sorted({batch.sample_indices[i] for own in self._ranks.gather(culprits) for i in own})
        where = f"rollout {batch.rollout_id}, optimizer step {self.steps_done}"
        if not everyones:
            return f"{where}; every sample's loss is finite, so the backward pass overflowed"
        return f"{where}; it comes from the samples {everyones}"


def _check_columns(batch: RolloutBatch, needs: Needs) -> None:
    """What the objective needs and only the rollout can bring is there."""
    if needs.rollout_logp and batch.rollout_log_probs is None:
        raise TrainingError(
            f"rollout {batch.rollout_id} brings no log-probabilities of the engine, which --use-rollout-logprobs and "
            "corrections for the engine (--use-tis, --use-rs, --get-mismatch-metrics) need; "
            "let the generate function fill in rollout_log_probs, or leave those flags out"
        )
    if needs.teacher_logp and batch.teacher_log_probs is None:
        raise TrainingError(
            f"rollout {batch.rollout_id} brings no log-probabilities of a teacher, which --advantage-estimator "
            "on_policy_distillation needs; let the reward or generate function fill in teacher_log_probs"
        )


class _Recorder:
    """Collects the scores of micro-batches into columns of the whole rollout."""

    def __init__(self, columns: Columns, ranks: Ranks, *, with_entropy: bool) -> None:
        self.with_entropy = with_entropy
        self.own_logp_A = torch.zeros_like(columns.mask_A)
        self._entropy_A = torch.zeros_like(columns.mask_A) if with_entropy else None
        self._ranks = ranks

    def add(self, micro_batch: MicroBatch, scores: LogProbs) -> None:
        self.own_logp_A.index_copy_(0, micro_batch.columns_T, scores.logp_T.detach())
        if self._entropy_A is not None:
            assert scores.entropy_T is not None
            self._entropy_A.index_copy_(0, micro_batch.columns_T, scores.entropy_T.detach())

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and entropies of all samples.  Collective."""
        entropy_A = None if self._entropy_A is None else self._ranks.sum(self._entropy_A)
        return self._ranks.sum(self.own_logp_A), entropy_A
