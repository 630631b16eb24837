"""Settings under which samples are older than the policy that trains on them, and nothing corrects for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miles.core.flags.algorithm import Algorithm
from miles.core.flags.training import Training

if TYPE_CHECKING:
    from miles.core.config import Config


def warnings(config: Config) -> Iterator[str]:
    """What a user should know before such a run starts.  The run is possible, so nothing is refused."""
    algorithm = config[Algorithm]
    if algorithm.loss_type != "policy_loss":
        return
    if (why := _off_policy(config)) and not _corrects(config):
        yield (
            f"{why}, and nothing corrects for it: the old log-probabilities are computed with the present weights, so "
            "the first ratio of every sample is 1 as if it were on-policy. Add --use-rollout-logprobs (the engine's "
            "log-probabilities as the old ones) or --use-tis (weights by the ratio of trainer to engine)"
        )
    if algorithm.use_rollout_logprobs and (cut := _truncation(config)):
        yield (
            f"{cut} samples from a part of the distribution, but engines report log-probabilities of all of it, and "
            "--use-rollout-logprobs takes them as the old ones: the ratio is biased by what could not be sampled"
        )
    if config.rollout_temperature == 0 and config.n_samples_per_prompt > 1:
        yield (
            f"--rollout-temperature 0 gives {config.n_samples_per_prompt} equal responses to every prompt: a group has "
            "no advantage left"
        )


def _off_policy(config: Config) -> str | None:
    if config[Training].async_training:
        interval = config[Training].update_weights_interval
        age = "a rollout" if interval == 1 else f"up to {interval} rollouts"
        return f"asynchronous training: samples are {age} or more older than the weights that train on them"
    if config.partial_rollout and not config.mask_offpolicy_in_partial_rollout:
        return (
            "--partial-rollout: responses are begun by older weights (--mask-offpolicy-in-partial-rollout masks them)"
        )
    return None


def _corrects(config: Config) -> bool:
    algorithm = config[Algorithm]
    return bool(
        algorithm.use_rollout_logprobs
        or algorithm.use_tis
        or algorithm.use_rs
        or algorithm.use_opsm
        or config[Training].keep_old_actor
    )


def _truncation(config: Config) -> str | None:
    if config.rollout_top_p < 1:
        return f"--rollout-top-p {config.rollout_top_p}"
    return f"--rollout-top-k {config.rollout_top_k}" if config.rollout_top_k > 0 else None
