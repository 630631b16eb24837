"""Rules across the flags of the objective.  Each yields one sentence per mistake.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from miles.core.config.discover import flag_table
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.debug import Debug
from miles.core.flags.training import Training
from miles.core.training.objective_spec import ESTIMATORS_WITHOUT_KL_PENALTY, ObjectiveSpec, required_inputs

if TYPE_CHECKING:
    from miles.core.config.config import Config

_MASKED_IMPORTANCE_ONLY = ("tis_mode", "tis_level", "tis_lower_bound", "tis_upper_bound", "tis_batch_normalize")
_REJECTION_ONLY = ("rs_level", "rs_lower_bound", "rs_upper_bound", "rs_veto_threshold")
_CRITIC_ONLY = (
    "critic_lr",
    "critic_lr_warmup_iters",
    "num_critic_only_steps",
    "value_clip",
    "critic_num_nodes",
    "critic_num_gpus_per_node",
    "critic_load",
    "critic_save",
)
_BOUNDS = (("tis_clip_low", "tis_clip"), ("tis_lower_bound", "tis_upper_bound"), ("rs_lower_bound", "rs_upper_bound"))


def check_kl_penalty(config: Config) -> Iterator[str]:
    """A KL penalty in the reward reaches the advantages."""
    algorithm = config[Algorithm]
    if algorithm.kl_coef != 0 and algorithm.advantage_estimator in ESTIMATORS_WITHOUT_KL_PENALTY:
        yield (
            f"--kl-coef {algorithm.kl_coef} has no effect with --advantage-estimator {algorithm.advantage_estimator}, "
            "which does not shape rewards. Penalize in the loss, with --use-kl-loss and --kl-loss-coef "
            f"{algorithm.kl_coef}, or choose another estimator"
        )


def check_critic(config: Config) -> Iterator[str]:
    """Flags of the critic have a critic, and the actor trains some time."""
    algorithm = config[Algorithm]
    if not algorithm.uses_critic:
        yield from _without_effect(config, _CRITIC_ONLY, "--advantage-estimator ppo")
    elif config.num_rollout is not None and algorithm.num_critic_only_steps >= config.num_rollout:
        yield (
            f"--num-critic-only-steps {algorithm.num_critic_only_steps} leaves none of --num-rollout "
            f"{config.num_rollout} rollouts to the actor. Lower it, or train longer"
        )


def check_old_actor(config: Config) -> Iterator[str]:
    """There are weights to keep, and log-probabilities to compute with them."""
    algorithm = config[Algorithm]
    if not config[Training].keep_old_actor:
        return
    if config[Debug].debug_train_only:
        yield (
            "--keep-old-actor keeps the weights that engines get, and --debug-train-only has no engines. Leave one of "
            "them out"
        )
    if algorithm.use_routing_replay and not algorithm.use_rollout_routing_replay:
        yield (
            "--keep-old-actor computes log-probabilities with several versions of the weights, and "
            "--use-routing-replay would record the routing of one. Leave one of them out, or replay the engine's "
            "(--use-rollout-routing-replay)"
        )
    if not required_inputs(ObjectiveSpec.from_flags(algorithm)).old_logp:
        yield (
            "--keep-old-actor has no effect: this objective compares with no old log-probabilities of the trainer "
            "(--use-rollout-logprobs takes the engine's). Leave one of them out"
        )


def check_masked_importance(config: Config) -> Iterator[str]:
    """Flags of masked importance sampling and of rejection have something to act on."""
    algorithm = config[Algorithm]
    correction = algorithm.custom_tis_function_path
    if algorithm.use_rs and correction in ("tis", "icepop"):
        yield (
            f"--custom-tis-function-path {correction} cannot reject, which --use-rs asks for. Use the correction mis, "
            "or leave --use-rs out"
        )
    if algorithm.use_rs and algorithm.use_rollout_logprobs:
        yield (
            "--use-rs and --use-rollout-logprobs exclude each other: with the engine's log-probabilities as the old "
            "ones there is no difference left to reject. Leave one of them out"
        )
    own_function = correction is not None and ("." in correction or ":" in correction)
    if not own_function and correction != "mis" and not algorithm.use_rs:
        yield from _without_effect(config, _MASKED_IMPORTANCE_ONLY, "--custom-tis-function-path mis")
    if not own_function and not algorithm.use_rs:
        yield from _without_effect(config, _REJECTION_ONLY, "--use-rs")


def check_weight_bounds(config: Config) -> Iterator[str]:
    """Lower bounds are below upper ones."""
    flags = flag_table().flags
    for low, high in _BOUNDS:
        lower, upper = getattr(config, low), getattr(config, high)
        if lower is not None and upper is not None and lower > upper:
            yield f"{flags[low].spelling} {lower} is above {flags[high].spelling} {upper}: no weight lies between them"


def _without_effect(config: Config, names: tuple[str, ...], needed: str) -> Iterator[str]:
    for name in names:
        spec = flag_table().flags[name]
        if config.origin[name] in ("flag", "file") and getattr(config, name) != spec.default:
            yield f"{spec.spelling} has no effect without {needed}. Add it, or leave {spec.spelling} out"


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    check_kl_penalty,
    check_critic,
    check_old_actor,
    check_masked_importance,
    check_weight_bounds,
)
