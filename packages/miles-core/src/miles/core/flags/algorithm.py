"""What is optimized: advantages, losses, penalties, corrections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from miles.core.config.group import DERIVED, Flag, Group

Fraction = Annotated[float, Field(ge=0, le=1)]


class Algorithm(Group):
    title = "Algorithm and RL Arguments"

    advantage_estimator: Literal[
        "grpo", "gspo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "on_policy_distillation"
    ] = "grpo"
    """How rewards become advantages of tokens. ``ppo`` trains a critic beside the actor."""

    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = "policy_loss"
    """The loss: policy gradient, supervised fine-tuning on the responses of the data, or a function of yours."""

    custom_loss_function_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a loss function ``(args, batch, logits, sum_of_sample_mean) -> (loss, metrics)``. Needs
    ``--loss-type custom_loss``."""

    critic_lr: Annotated[NonNegativeFloat, Flag(inherits="lr")] = DERIVED
    """Learning rate of the critic. Defaults to ``--lr``."""

    critic_lr_warmup_iters: NonNegativeInt = 0
    """Optimizer steps of the critic's warm-up."""

    num_critic_only_steps: NonNegativeInt = 0
    """First rollouts on which only the critic trains."""

    eps_clip: NonNegativeFloat = 0.2
    """Lower clip range of the policy ratio: the ratio stays above ``1 - eps_clip``."""

    eps_clip_high: Annotated[NonNegativeFloat, Flag(inherits="eps_clip")] = DERIVED
    """Upper clip range: the ratio stays below ``1 + eps_clip_high``. Defaults to ``--eps-clip``."""

    eps_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: caps the loss of tokens with a negative advantage at ``-eps_clip_c * advantage``
    (arXiv:1912.09729)."""

    value_clip: NonNegativeFloat = 0.2
    """Clip range of the value loss."""

    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty in the reward, per token, before advantages are computed."""

    use_kl_loss: bool = False
    """Add the KL divergence from the reference model to the loss."""

    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of the KL term in the loss."""

    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """Estimator of the KL divergence."""

    use_unbiased_kl: bool = False
    """Weight the KL estimate with the importance ratio, which makes its gradient unbiased off-policy."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the loss."""

    gamma: Fraction = 1.0
    """Discount per token."""

    lambd: Fraction = 1.0
    """Lambda of generalized advantage estimation."""

    normalize_advantages: bool = False
    """Whiten the advantages over all trained tokens of the rollout."""

    compute_advantages_and_returns: Annotated[
        bool, Flag(spelling="--disable-compute-advantages-and-returns", negates=True)
    ] = True
    """Do not compute advantages: for losses that need none (SFT)."""

    use_opd: bool = False
    """On-policy distillation beside any estimator: advantages are lowered by the reverse KL divergence from a teacher,
    ``--opd-kl-coef`` times ``log p_student - log p_teacher`` of each sampled token."""

    opd_kl_coef: NonNegativeFloat = 1.0
    """Weight of the reverse KL divergence of ``--use-opd``."""

    use_tis: bool = False
    """Correct for the difference between trainer and engine by truncated importance sampling."""

    tis_clip: NonNegativeFloat = 2.0
    """Upper bound of the importance weight."""

    tis_clip_low: NonNegativeFloat = 0.0
    """Lower bound of the importance weight."""

    custom_tis_function_path: Annotated[str | None, Flag(plugin="miles.corrections")] = None
    """Correction used instead of the truncated weight: name of an installed one, or a dotted path."""

    tis_mode: Literal["truncate", "clip", "mask"] = "truncate"
    """Correction ``mis``: what happens to a weight out of bounds. ``truncate`` cuts it to the upper bound, ``clip`` to
    both, ``mask`` takes its tokens out of the loss."""

    tis_level: Literal["token", "sequence", "geometric"] = "token"
    """Correction ``mis``: what a weight belongs to. ``geometric``: a sequence, by the mean of its tokens'
    log-ratios."""

    tis_lower_bound: PositiveFloat | None = None
    """Correction ``mis``: lower bound of a weight. Defaults to 1 / ``--tis-upper-bound``."""

    tis_upper_bound: PositiveFloat = 2.0
    """Correction ``mis``: upper bound of a weight."""

    tis_batch_normalize: bool = False
    """Correction ``mis``: divide the weights by their mean over the optimizer step."""

    use_rs: bool = False
    """Rejection sampling: tokens whose ratio of trainer to engine is out of bounds leave the loss. Chooses the
    correction ``mis``."""

    rs_level: Literal["token", "sequence", "geometric"] = "token"
    """What the ratio of a rejection belongs to."""

    rs_lower_bound: PositiveFloat | None = None
    """Ratio below which a rejection happens. Defaults to ``--tis-lower-bound``."""

    rs_upper_bound: PositiveFloat | None = None
    """Ratio above which a rejection happens. Defaults to ``--tis-upper-bound``."""

    rs_veto_threshold: PositiveFloat | None = None
    """A sequence leaves the loss when the ratio of one of its tokens is below this."""

    custom_pg_loss_reducer_function_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function that makes the reducer of the policy loss: ``(total_lengths, response_lengths,
    loss_masks, calculate_per_token_loss) -> reducer``."""

    use_routing_replay: bool = False
    """Replay the expert routing of the first forward pass in the later ones (megatron backend)."""

    use_rollout_routing_replay: bool = False
    """Replay the engine's expert routing in training. Sets ``--use-routing-replay``."""

    use_opsm: bool = False
    """Off-policy sequence masking: sequences with a negative advantage that drifted too far from the policy do not
    train."""

    opsm_delta: NonNegativeFloat = 1e-4
    """Mean KL above which off-policy sequence masking drops a sequence."""

    get_mismatch_metrics: bool = False
    """Compute the statistics of ``--custom-tis-function-path`` without applying its correction."""

    ref_update_interval: PositiveInt | None = None
    """Rollouts after which the reference model becomes a copy of the actor, again and again."""

    reset_optimizer_states: bool = False
    """Forget the optimizer's moments at the start of every rollout."""

    grpo_std_normalization: Annotated[bool, Flag(spelling="--disable-grpo-std-normalization", negates=True)] = True
    """Do not divide a group's centred rewards by their standard deviation."""

    rewards_normalization: Annotated[bool, Flag(spelling="--disable-rewards-normalization", negates=True)] = True
    """Do not centre rewards within their group."""

    use_rollout_entropy: bool = False
    """Compute the entropy together with the old log-probabilities, and log it."""

    use_rollout_logprobs: bool = False
    """Take the engine's log-probabilities as the old ones, instead of computing them with the trainer."""

    calculate_per_token_loss: bool = False
    """Average the loss over all tokens of a step instead of over its samples."""

    seed: int = 1234
    """Seed of the trainer."""

    @property
    def uses_critic(self) -> bool:
        """Whether a critic is trained beside the actor."""
        return self.advantage_estimator == "ppo" and self.compute_advantages_and_returns
