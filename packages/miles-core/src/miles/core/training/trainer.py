"""Training on one rollout: the procedure that all backends share.

The whole rollout is known to every rank.  A rank computes the log-probabilities of its own samples; they are exchanged,
so that everyone computes advantages, whitening and metrics on the whole rollout, and nothing depends on who had what.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from miles.core.errors import TrainingError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.cluster import Cluster
from miles.core.flags.data import Data
from miles.core.flags.logging import Logging
from miles.core.flags.optimizer import Optimizer
from miles.core.flags.training import Training
from miles.core.protocols.backend import Scores, TrainReport
from miles.core.registry import load_object
from miles.core.training.clock import PhaseClock
from miles.core.training.columns import Columns, batch_means
from miles.core.training.debugging import Debugging
from miles.core.training.flops import ModelFlops
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.model import Model, Output, Scorer
from miles.core.training.objective import build_advantages, build_objective
from miles.core.training.objective_spec import Needs, ObjectiveSpec, required_inputs
from miles.core.training.old_policies import OldPolicies
from miles.core.training.on_policy import check_on_policy
from miles.core.training.packing import Packing
from miles.core.training.plan import StepPlan, plan_rollout
from miles.core.training.procedure import Procedure
from miles.core.training.ranks import Ranks, process_rank
from miles.core.training.recorder import Recorder
from miles.core.training.settings import cap_warning, learning_rate, scoring_packing
from miles.core.types.batch import Floats, RolloutBatch

if TYPE_CHECKING:
    from miles.core.config import Config


class RolloutTrainer(Procedure):
    """Scores, advantages and optimizer steps of the actor, rollout after rollout."""

    def __init__(
        self,
        config: Config,
        model: Model,
        *,
        reference: Scorer | None,
        ranks: Ranks,
        device: torch.device,
        old_policies: OldPolicies | None = None,
        teacher: Scorer | None = None,
    ) -> None:
        """``teacher``: of distillation, where rollouts do not bring its log-probabilities."""
        algorithm, data = config[Algorithm], config[Data]
        spec = ObjectiveSpec.from_flags(config)
        objective = build_objective(spec, config)
        super().__init__(config, model, objective, learning_rate(config[Optimizer], data), ranks=ranks, device=device)
        self._model = model
        self._reference = reference
        self._old_policies = old_policies
        self._teacher = teacher
        if process_rank() == 0 and (
            warning := cap_warning(
                data,
                config.rollout_max_prompt_len,
                config.rollout_max_response_len,
                sharing=1 if ranks.context is None else ranks.context.count,
            )
        ):
            logging.getLogger(__name__).warning(warning)
        self._scoring_packing = scoring_packing(data)
        self._on_logits = objective.consumes == "logits"
        self._advantages = build_advantages(spec) if algorithm.compute_advantages_and_returns else None
        self._needs = {one: required_inputs(spec, one_step=one) for one in (True, False)}
        self._proves_on_policy = config[Training].true_on_policy_mode
        if self._proves_on_policy:
            self._needs = {one: replace(needs, old_logp=True, rollout_logp=True) for one, needs in self._needs.items()}
        self._critic_needs = required_inputs(spec, role="critic")
        self._compares_old_policy = self._needs[False].old_logp
        self._log_entropy = algorithm.use_rollout_entropy
        self._log_correct = config[Logging].log_correct_samples
        self._flops = ModelFlops.of_checkpoint(config[Checkpoint].hf_checkpoint)
        self._num_ranks = config[Cluster].actor_num_nodes * config[Cluster].actor_num_gpus_per_node
        self._debugging = Debugging(config, "actor", process_rank())
        self._postprocess = _postprocess(config)

    def score(self, batch: RolloutBatch) -> Scores:
        """The log-probabilities that the critic's returns depend on, by their columns' names.  Collective."""
        columns = Columns.of(batch, self._device)
        needs = self._with_old_policies(batch, self._critic_needs)
        self._add_scores(batch, self._plan(batch), columns, PhaseClock(), needs)
        known = {"log_probs": columns.old_logp_A, "ref_log_probs": columns.ref_logp_A}
        return {name: columns.per_sample(column) for name, column in known.items() if column is not None}

    def log_probs(self, batch: RolloutBatch) -> tuple[Floats, ...]:
        """[R] of every sample, under the policy as it is now.  Collective."""
        columns = Columns.of(batch, self._device)
        logp_A, _ = self._scores(batch, self._in_one_go(batch, self._packing), columns, self._model)
        return columns.per_sample(logp_A)

    def train(self, batch: RolloutBatch) -> TrainReport:
        """Train on one rollout.  Collective; every rank passes the whole rollout."""
        with self._debugging.rollout(batch.rollout_id):
            return self._train(batch)

    def _train(self, batch: RolloutBatch) -> TrainReport:
        clock = PhaseClock()
        with clock.phase("data_preprocess"):
            steps = self._plan(batch)
            columns = Columns.of(batch, self._device)
        needs = self._with_old_policies(batch, self._needs[len(steps) == 1])
        _check_columns(batch, needs, has_teacher=self._teacher is not None)
        with self._debugging.part("train_log_probs", batch.rollout_id):
            self._add_scores(batch, steps, columns, clock, needs)
        if self._proves_on_policy:
            check_on_policy(batch, columns)
        if self._advantages is not None:
            columns.take_advantages(self._advantages(columns.advantage_inputs()))
        if self._postprocess is not None:
            self._postprocess(columns.for_hook(batch))
        if self._fresh_optimizer:
            self._model.reset_optimizer()
        with clock.phase("actor_train"), self._debugging.part("train_actor", batch.rollout_id):
            metrics = self._train_steps(batch, steps, columns)
        tokens = sum(batch.total_lengths)
        means = batch_means(batch) | columns.means()
        means["perf/actor_train_tok_per_s"] = tokens / clock.seconds["actor_train"]
        if self._flops is not None:
            means |= self._flops.rates(batch.total_lengths, clock.seconds, self._num_ranks)
        if self._log_correct and columns.entropy_A is not None:
            means |= columns.entropy_of(batch.raw_rewards)
        report = TrainReport(metrics=means, steps=tuple(metrics), timings=clock.seconds)
        self._debugging.trained(batch, columns, steps, report)
        return report

    def _add_scores(
        self, batch: RolloutBatch, steps: Sequence[StepPlan], columns: Columns, clock: PhaseClock, needs: Needs
    ) -> None:
        """Log-probabilities that must be known before the first step, and are not yet."""
        wants_reference = needs.ref_logp and columns.ref_logp_A is None
        wants_teacher = needs.teacher_logp and columns.teacher_logp_A is None
        wants_old = needs.old_logp and columns.old_logp_A is None
        if not (wants_reference or wants_teacher or wants_old):
            return
        micro_batches = self._scoring_micro_batches(batch, steps)
        if wants_teacher:
            assert self._teacher is not None
            with clock.phase("teacher_log_probs"):
                columns.teacher_logp_A, _ = self._scores(batch, micro_batches, columns, self._teacher)
        if wants_reference:
            assert self._reference is not None
            with clock.phase("ref_log_probs"):
                columns.ref_logp_A, _ = self._scores(batch, micro_batches, columns, self._reference)
        if wants_old:
            with clock.phase("log_probs"):
                columns.old_logp_A, columns.entropy_A = self._old_scores(batch, micro_batches, columns)

    def _kept_versions(self) -> tuple[int, ...]:
        return () if self._old_policies is None else tuple(self._old_policies.versions)

    def _with_old_policies(self, batch: RolloutBatch, needs: Needs) -> Needs:
        """Old log-probabilities take passes of their own where the weights that generated are kept, and others."""
        return replace(needs, old_logp=True) if self._is_off_policy(batch) else needs

    def _is_off_policy(self, batch: RolloutBatch) -> bool:
        """Whether kept weights made a token, and not those that train now, whose version is the rollout's number."""
        if self._old_policies is None or not self._compares_old_policy:
            return False
        return bool((self._old_policies.version_of_tokens(batch) != batch.rollout_id).any())

    def _old_scores(
        self, batch: RolloutBatch, micro_batches: Sequence[MicroBatch], columns: Columns
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """By the policy that is trained, or of each token by the kept one that made it."""
        with_entropy = self._log_entropy
        if not self._is_off_policy(batch):
            return self._scores(batch, micro_batches, columns, self._model, with_entropy=with_entropy)
        assert self._old_policies is not None
        version_A = self._old_policies.version_of_tokens(batch).to(self._device)
        logp_A = torch.zeros_like(columns.mask_A)
        entropy_A = torch.zeros_like(columns.mask_A) if with_entropy else None
        for version in version_A.unique().tolist():
            made_A = version_A == version
            scorer = self._model if version == batch.rollout_id else self._old_policies.scorer(version)
            found_A, found_entropy_A = self._scores(batch, micro_batches, columns, scorer, with_entropy=with_entropy)
            logp_A = torch.where(made_A, found_A, logp_A)
            if entropy_A is not None:
                entropy_A = torch.where(made_A, found_entropy_A, entropy_A)
        return logp_A, entropy_A

    def _scoring_micro_batches(self, batch: RolloutBatch, steps: Sequence[StepPlan]) -> list[MicroBatch]:
        """Those of training, unless log-probabilities have a cap of their own."""
        if self._scoring_packing is not None:
            return self._in_one_go(batch, self._scoring_packing)
        return [micro_batch for step in steps for micro_batch in step.micro_batches]

    def _in_one_go(self, batch: RolloutBatch, packing: Packing) -> list[MicroBatch]:
        """Micro-batches of the whole rollout, whatever its steps."""
        (step,) = plan_rollout(batch, len(batch), packing, self._ranks, self._device)
        return list(step.micro_batches)

    def _scores(
        self,
        batch: RolloutBatch,
        micro_batches: Sequence[MicroBatch],
        columns: Columns,
        model: Scorer,
        *,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores of the whole rollout."""
        recorder = Recorder(columns, self._ranks, "entropy" if with_entropy else "logprobs")
        for micro_batch, scores in zip(
            micro_batches, model.score(micro_batches, with_entropy=with_entropy), strict=True
        ):
            recorder.add(micro_batch, scores)
        logp_A, entropy_A = recorder.everyones(), recorder.entropy()
        self._steps.check_scores("log-probabilities", batch, columns, logp_A)
        return logp_A, entropy_A

    def _train_steps(self, batch: RolloutBatch, steps: Sequence[StepPlan], columns: Columns) -> list[dict[str, float]]:
        """All optimizer steps.  The scores of a single step are those of the old policy, if nobody asked before."""
        alone = len(steps) == 1 and not self._on_logits
        recorder = Recorder(columns, self._ranks, self._wanted_output(alone and columns.entropy_A is None))
        metrics = [self._steps.take(batch, step, columns, recorder) for step in steps]
        if alone and columns.old_logp_A is None:
            columns.old_logp_A = recorder.everyones()
        if alone and columns.entropy_A is None:
            columns.entropy_A = recorder.entropy()
        return metrics

    def _wanted_output(self, entropy_unknown: bool) -> Output:
        if self._on_logits:
            return "logits"
        if self._needs[True].entropy or (self._log_entropy and entropy_unknown):
            return "entropy"
        return "logprobs"


def _postprocess(config: Config) -> Callable[[Mapping[str, Any]], None] | None:
    """``--rollout-data-postprocess-path``, given the configuration."""
    path = config.rollout_data_postprocess_path
    if path is None:
        return None
    function = load_object(path)
    return lambda data: function(config, data)


def _check_columns(batch: RolloutBatch, needs: Needs, *, has_teacher: bool) -> None:
    """What the objective needs and only the rollout can bring is there."""
    if needs.rollout_logp and batch.rollout_log_probs is None:
        raise TrainingError(
            f"rollout {batch.rollout_id} brings no log-probabilities of the engine, which --use-rollout-logprobs and "
            "corrections for the engine (--use-tis, --use-rs, --get-mismatch-metrics) need; "
            "let the generate function fill in rollout_log_probs, or leave those flags out"
        )
    if needs.values and batch.values is None:
        raise TrainingError(
            f"rollout {batch.rollout_id} comes without the critic's values, which --advantage-estimator ppo needs"
        )
    if needs.teacher_logp and batch.teacher_log_probs is None and not has_teacher:
        raise TrainingError(
            f"rollout {batch.rollout_id} brings no log-probabilities of a teacher, which --use-opd and "
            "--advantage-estimator on_policy_distillation need; name a teacher with --opd-teacher-load or "
            "--opd-teacher-urls, or let the reward or generate function fill in teacher_log_probs"
        )
