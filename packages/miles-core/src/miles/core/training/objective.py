"""The objective of a run: composed once from the flags, then called for every micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from miles.core.advantages.distill import sampled_reverse_kl
from miles.core.advantages.estimate import AdvantageEstimator, AdvantageInputs, AdvantageOptions, Advantages
from miles.core.advantages.whiten import whiten
from miles.core.math.kl import KlKind, approx_kl
from miles.core.math.ratio import masked_log_ratio
from miles.core.protocols.backend import Role
from miles.core.registry import Registry, load_object
from miles.core.training.corrections import Correction
from miles.core.training.loss_batch import LossBatch, LossOutput
from miles.core.training.loss_hooks import CustomCorrection, CustomLoss, custom_reducer
from miles.core.training.losses import Consumes, KlTerm, PgReducer, PolicyLoss, Reduction, SftLoss, ValueLoss
from miles.core.training.metric_sums import AllReduce, single_rank
from miles.core.training.objective_spec import Needs, ObjectiveSpec, required_inputs

__all__ = [
    "AdvantageRule",
    "Needs",
    "Objective",
    "ObjectiveBuilder",
    "ObjectiveSpec",
    "build_advantages",
    "build_objective",
    "required_inputs",
]


class Objective(Protocol):
    """Loss and metrics of a micro-batch."""

    @property
    def consumes(self) -> Consumes:
        """What of the model's output the first argument is."""

    def denominator(self, mask_sums: Sequence[float]) -> float:
        """What ``loss`` and token metrics of an optimizer step are divided by.

        ``mask_sums`` are the trainable tokens of each of its samples, over all ranks.
        """

    def prepare(self, batches: Sequence[LossBatch], all_reduce: AllReduce = single_rank) -> list[LossBatch]:
        """The micro-batches of one optimizer step, completed with what depends on all of them.

        Called once per step, by every rank.
        """

    def __call__(self, output: Any, batch: LossBatch) -> LossOutput:
        """Sums over the micro-batch.  ``output``: ``LogProbs``, values or logits, as ``consumes`` says."""


class ObjectiveBuilder(Protocol):
    """``miles.losses`` entry points.  ``args`` has every flag as an attribute; it is for users' functions."""

    def __call__(self, spec: ObjectiveSpec, args: Any) -> Objective: ...


def build_objective(spec: ObjectiveSpec, args: Any, *, role: Role = "actor") -> Objective:
    """The objective that the flags describe.  Plugins and users' functions are looked up here, once.

    Raises PluginError when one is missing.
    """
    name = "value_loss" if role == "critic" else spec.loss_type
    builder: ObjectiveBuilder = Registry("miles.losses").get(name)
    return builder(spec, args)


def build_policy_loss(spec: ObjectiveSpec, args: Any) -> PolicyLoss:
    """``policy_loss``: GRPO, GSPO, PPO, REINFORCE++ and distillation differ in advantages and in the ratio alone."""
    return PolicyLoss(
        reduction=Reduction(spec.calculate_per_token_loss),
        clip_low=spec.eps_clip,
        clip_high=spec.eps_clip if spec.eps_clip_high is None else spec.eps_clip_high,
        dual_clip=spec.eps_clip_c,
        sequence_ratio=spec.advantage_estimator == "gspo",
        opsm_delta=spec.opsm_delta if spec.use_opsm else None,
        old_is_rollout=spec.use_rollout_logprobs,
        correction=_correction(spec, args) if spec.uses_correction else None,
        apply_correction=spec.use_tis or spec.use_rs,
        kl=KlTerm(spec.kl_loss_type, spec.kl_loss_coef, spec.use_unbiased_kl) if spec.use_kl_loss else None,
        entropy_coef=spec.entropy_coef,
        pg_reducer=_pg_reducer(spec),
    )


def build_sft_loss(spec: ObjectiveSpec, args: Any) -> SftLoss:
    """``sft_loss``."""
    return SftLoss(Reduction(spec.calculate_per_token_loss))


def build_value_loss(spec: ObjectiveSpec, args: Any) -> ValueLoss:
    """``value_loss``, the critic's."""
    return ValueLoss(spec.value_clip, Reduction(spec.calculate_per_token_loss))


def build_custom_loss(spec: ObjectiveSpec, args: Any) -> CustomLoss:
    """``custom_loss``: the function at ``--custom-loss-function-path``."""
    if spec.custom_loss_function_path is None:
        raise ValueError("--loss-type custom_loss needs --custom-loss-function-path")
    function = load_object(spec.custom_loss_function_path)
    return CustomLoss(function, args, Reduction(spec.calculate_per_token_loss))


def _correction(spec: ObjectiveSpec, args: Any) -> Correction:
    """An installed correction, or a function of the user's at a dotted path."""
    registry = Registry("miles.corrections")
    name = spec.custom_tis_function_path or ("mis" if spec.use_rs else "tis")
    if registry.find(name) is None:
        return CustomCorrection(registry.get(name), args)
    correction: Correction = registry.get(name)(args)
    return correction


def _pg_reducer(spec: ObjectiveSpec) -> PgReducer | None:
    path = spec.custom_pg_loss_reducer_function_path
    return custom_reducer(load_object(path), per_token=spec.calculate_per_token_loss) if path else None


@dataclass(frozen=True, slots=True)
class AdvantageRule:
    """How the run turns rewards into advantages.  Called once per rollout."""

    estimator: AdvantageEstimator
    options: AdvantageOptions
    kl_kind: KlKind
    old_is_rollout: bool
    whitened: bool
    distillation_coef: float = 0.0
    """Weight of the reverse KL divergence from a teacher, whatever the estimator."""

    def __call__(self, inputs: AdvantageInputs, all_reduce: AllReduce = single_rank) -> Advantages:
        """Advantages of ``inputs``, whitened if the flags say so.

        ``all_reduce`` adds over the ranks that hold other samples or other parts of them; none where ``inputs`` is the
        whole rollout.
        """
        if self.old_is_rollout:
            inputs = replace(inputs, old_logp_A=inputs.rollout_logp_A)
        if self.options.kl_coef != 0.0:
            inputs = replace(inputs, kl_A=self._kl(inputs))
        advantages = self.estimator(inputs, self.options)
        if self.distillation_coef:
            penalty_A = self.distillation_coef * sampled_reverse_kl(inputs)
            advantages = replace(advantages, advantage_A=advantages.advantage_A - penalty_A)
        if not self.whitened:
            return advantages
        return replace(advantages, advantage_A=whiten(advantages.advantage_A, inputs.mask_A, all_reduce))

    def _kl(self, inputs: AdvantageInputs) -> torch.Tensor:
        """KL from the reference model at each token; 0 on masked ones, which the policy did not choose."""
        if inputs.old_logp_A is None or inputs.ref_logp_A is None:
            raise ValueError("a KL penalty needs the log-probabilities of the policy and of the reference model")
        return approx_kl(masked_log_ratio(inputs.old_logp_A, inputs.ref_logp_A, inputs.masked_A), self.kl_kind)


def build_advantages(spec: ObjectiveSpec) -> AdvantageRule:
    """The advantages that the flags describe.  Raises PluginError for an estimator that is not installed."""
    return AdvantageRule(
        estimator=Registry("miles.advantages").get(spec.advantage_estimator),
        options=AdvantageOptions(spec.gamma, spec.lambd, spec.kl_coef if spec.penalizes_kl_in_reward else 0.0),
        kl_kind=spec.kl_loss_type,
        old_is_rollout=spec.use_rollout_logprobs,
        whitened=spec.normalize_advantages,
        distillation_coef=spec.opd_kl_coef if spec.use_opd else 0.0,
    )
