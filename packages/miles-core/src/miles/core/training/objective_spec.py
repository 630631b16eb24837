"""The flags that shape the objective, and which inputs they make necessary.  Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from miles.core.protocols.backend import Role

ESTIMATORS_WITHOUT_KL_PENALTY = ("grpo", "gspo", "on_policy_distillation")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSpec:
    """Flags by their flat names; each means what its flag's help says."""

    loss_type: str = "policy_loss"
    custom_loss_function_path: str | None = None
    calculate_per_token_loss: bool = False

    advantage_estimator: str = "grpo"
    compute_advantages_and_returns: bool = True
    normalize_advantages: bool = False
    gamma: float = 1.0
    lambd: float = 1.0
    kl_coef: float = 0.0
    use_opd: bool = False
    opd_kl_coef: float = 1.0

    eps_clip: float = 0.2
    eps_clip_high: float | None = None
    eps_clip_c: float | None = None
    value_clip: float = 0.2
    custom_pg_loss_reducer_function_path: str | None = None

    use_kl_loss: bool = False
    kl_loss_coef: float = 0.0
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    use_unbiased_kl: bool = False
    entropy_coef: float = 0.0

    use_opsm: bool = False
    opsm_delta: float = 1e-4
    use_rollout_logprobs: bool = False
    get_mismatch_metrics: bool = False
    custom_tis_function_path: str | None = None
    use_tis: bool = False
    tis_clip: float = 2.0
    tis_clip_low: float = 0.0
    tis_mode: Literal["truncate", "clip", "mask"] = "truncate"
    tis_level: Literal["token", "sequence", "geometric"] = "token"
    tis_lower_bound: float | None = None
    tis_upper_bound: float = 2.0
    tis_batch_normalize: bool = False
    use_rs: bool = False
    rs_level: Literal["token", "sequence", "geometric"] = "token"
    rs_lower_bound: float | None = None
    rs_upper_bound: float | None = None
    rs_veto_threshold: float | None = None

    @classmethod
    def from_flags(cls, flags: Any) -> ObjectiveSpec:
        """From the configuration, its ``Algorithm`` group, or anything else with these attributes."""
        return cls(**{field.name: getattr(flags, field.name) for field in fields(cls)})

    @property
    def uses_correction(self) -> bool:
        """Whether the mismatch between trainer and engine is corrected, or measured as if."""
        return self.use_tis or self.use_rs or self.get_mismatch_metrics

    @property
    def penalizes_kl_in_reward(self) -> bool:
        """Whether rewards are shaped by the KL divergence from the reference model."""
        return self.kl_coef != 0.0 and self.advantage_estimator not in ESTIMATORS_WITHOUT_KL_PENALTY


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Inputs beside the samples themselves, True where they are necessary."""

    advantages: bool = False
    old_logp: bool = False
    """Log-probabilities by the trainer before the first optimizer step on a rollout: a forward pass of its own."""
    ref_logp: bool = False
    """Log-probabilities by the reference model."""
    rollout_logp: bool = False
    """Log-probabilities by the engine."""
    teacher_logp: bool = False
    values: bool = False
    """The critic's values before the first optimizer step on a rollout."""
    entropy: bool = False
    """Entropy of each token, differentiable, in the training forward pass."""


def required_inputs(spec: ObjectiveSpec, *, role: Role = "actor", one_step: bool = False) -> Needs:
    """What has to be computed before the objective can be.

    ``one_step``: one optimizer step consumes the whole rollout, so the policy of its forward pass is the old policy.
    Then old log-probabilities are needed only where something depends on them before that forward pass: a KL penalty in
    the reward, distillation, or importance weights that are normalized over the step.
    """
    if role == "critic":
        return Needs(advantages=True, values=True, **_reward_needs(spec))
    if spec.loss_type == "sft_loss":
        return Needs()
    return Needs(
        advantages=spec.compute_advantages_and_returns,
        rollout_logp=spec.use_rollout_logprobs or spec.uses_correction,
        values=spec.advantage_estimator == "ppo" and spec.compute_advantages_and_returns,
        entropy=spec.entropy_coef != 0.0,
        **_merged(_reward_needs(spec), _distillation_needs(spec), _loss_needs(spec, one_step)),
    )


def _reward_needs(spec: ObjectiveSpec) -> dict[str, bool]:
    """Needs of the advantages: log-probabilities under the policy, be they the trainer's or (for that) the engine's."""
    if not spec.compute_advantages_and_returns:
        return {}
    distills = spec.advantage_estimator == "on_policy_distillation"
    policy = distills or spec.penalizes_kl_in_reward
    return {
        "old_logp": policy and not spec.use_rollout_logprobs,
        "ref_logp": spec.penalizes_kl_in_reward,
        "teacher_logp": distills,
    }


def _distillation_needs(spec: ObjectiveSpec) -> dict[str, bool]:
    distills = spec.use_opd and spec.compute_advantages_and_returns
    return {"old_logp": distills and not spec.use_rollout_logprobs, "teacher_logp": distills}


def _loss_needs(spec: ObjectiveSpec, one_step: bool) -> dict[str, bool]:
    trainer_is_compared = spec.uses_correction or not spec.use_rollout_logprobs
    normalizes = spec.uses_correction and spec.tis_batch_normalize
    return {
        "old_logp": (trainer_is_compared and not one_step) or normalizes,
        "ref_logp": spec.use_kl_loss,
    }


def _merged(*needs: dict[str, bool]) -> dict[str, bool]:
    return {name: any(part.get(name, False) for part in needs) for part in needs for name in part}
