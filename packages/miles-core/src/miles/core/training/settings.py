"""Flags that every backend reads the same way."""

from __future__ import annotations

from dataclasses import replace

from miles.core.flags.algorithm import Algorithm
from miles.core.flags.data import Data
from miles.core.flags.optimizer import Optimizer
from miles.core.training.packing import Packing
from miles.core.training.schedule import LearningRate


def packing(data: Data) -> Packing:
    """How micro-batches are formed."""
    return Packing(
        max_tokens=data.max_tokens_per_gpu if data.use_dynamic_batch_size else None,
        micro_batch_size=data.micro_batch_size,
        balance=data.balance_data,
    )


def scoring_packing(data: Data) -> Packing | None:
    """The same where only log-probabilities are computed; None: in the micro-batches of training."""
    cap = data.log_probs_max_tokens_per_gpu if data.use_dynamic_batch_size else None
    return None if cap in (None, data.max_tokens_per_gpu) else replace(packing(data), max_tokens=cap)


def learning_rate(optimizer: Optimizer, data: Data) -> LearningRate:
    """The actor's schedule.  Its decay ends with the run unless ``--lr-decay-iters`` says otherwise."""
    decay_steps = optimizer.lr_decay_iters or _steps_of_run(data)
    warmup_steps = optimizer.lr_warmup_iters
    if optimizer.lr_warmup_fraction is not None and decay_steps is not None:
        warmup_steps = round(optimizer.lr_warmup_fraction * decay_steps)
    return LearningRate(
        peak=optimizer.lr,
        style=optimizer.lr_decay_style,
        minimum=optimizer.min_lr,
        warmup_steps=warmup_steps,
        warmup_init=optimizer.lr_warmup_init,
        decay_steps=decay_steps,
        anneal_steps=optimizer.lr_wsd_decay_iters or 0,
        anneal_style=optimizer.lr_wsd_decay_style or "exponential",
    )


def critic_learning_rate(algorithm: Algorithm, optimizer: Optimizer, data: Data) -> LearningRate:
    """The critic's schedule: the actor's, with a peak and a warm-up of its own."""
    return replace(
        learning_rate(optimizer, data), peak=algorithm.critic_lr, warmup_steps=algorithm.critic_lr_warmup_iters
    )


def cap_warning(data: Data, max_prompt: int | None, max_response: int | None, *, sharing: int = 1) -> str | None:
    """What to tell a user whose samples may exceed the cap on tokens; None when they cannot or nobody knows.

    ``sharing`` ranks hold a sample together.
    """
    cap = packing(data).shared_by(sharing).max_tokens
    if cap is None or max_prompt is None or max_response is None or max_prompt + max_response <= cap:
        return None
    return (
        f"a sample may have --rollout-max-prompt-len {max_prompt} + --rollout-max-response-len {max_response} tokens, "
        f"more than --max-tokens-per-gpu {_times(data.max_tokens_per_gpu, sharing)}: it will be alone in a "
        "micro-batch that exceeds the cap"
    )


def _times(value: int | None, count: int) -> str:
    return f"{value}" if count == 1 else f"{value} x {count} (--context-parallel-size)"


def schedule_problems(optimizer: Optimizer, data: Data) -> list[str]:
    """What stops the schedule from being computed."""
    problems = []
    style = optimizer.lr_decay_style
    # The driver counts the rollouts of --num-epoch before the trainer starts.
    counted = data.num_rollout is not None or data.num_epoch is not None
    length_known = optimizer.lr_decay_iters is not None or counted
    if not length_known and style not in ("constant", "inverse-square-root"):
        problems.append(
            f"--lr-decay-style {style} needs to know where the decay ends: "
            "give --lr-decay-iters (optimizer steps) or --num-rollout"
        )
    if not length_known and optimizer.lr_warmup_fraction is not None:
        problems.append(
            f"--lr-warmup-fraction {optimizer.lr_warmup_fraction} is a share of the decay: "
            "give --lr-decay-iters or --num-rollout, or set the warm-up in steps with --lr-warmup-iters"
        )
    if optimizer.lr_warmup_fraction is not None and optimizer.lr_warmup_iters:
        problems.append(
            f"--lr-warmup-fraction {optimizer.lr_warmup_fraction} and --lr-warmup-iters {optimizer.lr_warmup_iters} "
            "both set the warm-up; give one of them"
        )
    if style == "WSD" and optimizer.lr_wsd_decay_iters is None:
        problems.append("--lr-decay-style WSD needs --lr-wsd-decay-iters, the steps over which it anneals at the end")
    if (optimizer.lr_decay_iters is not None or data.num_rollout is not None) and not problems:
        problems += _length_problems(learning_rate(optimizer, data))
    return problems


def _steps_of_run(data: Data) -> int | None:
    return None if data.num_rollout is None else data.num_rollout * (data.num_steps_per_rollout or 1)


def _length_problems(schedule: LearningRate) -> list[str]:
    if schedule.style in ("constant", "inverse-square-root") or schedule.decay_steps is None:
        return []
    before = schedule.warmup_steps + schedule.anneal_steps
    if before <= schedule.decay_steps:
        return []
    return [
        f"warm-up and annealing take {before} optimizer steps, but the decay ends after {schedule.decay_steps} "
        "(--lr-decay-iters, or --num-rollout times --num-steps-per-rollout); shorten them or train longer"
    ]
