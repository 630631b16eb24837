"""Rules across the flags of training itself: what is optimized, how fast, in which portions.

Each yields one sentence per mistake, as those in ``checks`` do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.data import Data
from miles.core.flags.optimizer import Optimizer
from miles.core.flags.training import Training
from miles.core.training.objective_spec import ObjectiveSpec, required_inputs
from miles.core.training.settings import schedule_problems

if TYPE_CHECKING:
    from miles.core.config import Config


def check_weight_copies(config: Config) -> Iterator[str]:
    """What needs copies of weights in host memory may have them."""
    training = config[Training]
    if training.enable_weights_backuper:
        return
    if training.keep_old_actor:
        yield "--keep-old-actor keeps older weights in host memory, and --disable-weights-backuper keeps none there"
    needs = required_inputs(ObjectiveSpec.from_flags(config[Algorithm]))
    if training.train_backend == "megatron" and needs.ref_logp:
        yield (
            "--disable-weights-backuper: on the megatron backend a reference model waits in host memory for its turn. "
            "Leave the flag out, or the divergence from a reference (--use-kl-loss, --kl-coef)"
        )
    if training.train_backend == "megatron" and needs.teacher_logp and config.opd_type == "megatron":
        yield (
            "--disable-weights-backuper: on the megatron backend the trainer's own teacher waits in host memory for "
            "its turn. Leave the flag out, or let an engine serve the teacher (--opd-type sglang)"
        )


def check_loss(config: Config) -> Iterator[str]:
    """Estimator, loss and penalties go together."""
    algorithm = config[Algorithm]
    if (algorithm.loss_type == "custom_loss") != (algorithm.custom_loss_function_path is not None):
        yield "--loss-type custom_loss and --custom-loss-function-path go together: give both or none"
    if algorithm.kl_coef != 0 and algorithm.kl_loss_coef != 0:
        yield (
            f"--kl-coef {algorithm.kl_coef} and --kl-loss-coef {algorithm.kl_loss_coef} would both penalize the "
            "divergence from the reference model, once in the reward and once in the loss. Set one of them to 0"
        )
    whitened = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
    if algorithm.advantage_estimator in whitened and not algorithm.normalize_advantages:
        yield f"--advantage-estimator {algorithm.advantage_estimator} needs --normalize-advantages"


def check_corrections(config: Config) -> Iterator[str]:
    """Corrections between trainer and engine do not exclude each other."""
    algorithm = config[Algorithm]
    if algorithm.use_rollout_logprobs and algorithm.use_tis:
        yield (
            "--use-rollout-logprobs and --use-tis exclude each other: with the engine's log-probabilities as the old "
            "ones there is no difference left to correct. Leave one of them out"
        )
    if algorithm.get_mismatch_metrics and algorithm.custom_tis_function_path is None:
        yield "--get-mismatch-metrics needs --custom-tis-function-path, whose statistics it computes"


def check_schedule(config: Config) -> Iterator[str]:
    """The learning rate is known at every step, and set in one way."""
    optimizer = config[Optimizer]
    yield from schedule_problems(optimizer, config[Data])
    fraction = optimizer.lr_warmup_fraction
    if config.origin["warmup_ratio"] in ("flag", "file") and fraction != optimizer.warmup_ratio:
        yield (
            f"--warmup-ratio {optimizer.warmup_ratio} and --lr-warmup-fraction {fraction} are two names of one "
            "setting. Give one of them"
        )
    if optimizer.override_lr_scheduler and optimizer.use_checkpoint_lr_scheduler:
        yield (
            "--override-lr-scheduler takes the schedule from the command line, --use-checkpoint-lr-scheduler from the "
            "checkpoint. Give one of them"
        )


def check_length_of_run(config: Config) -> Iterator[str]:
    """The run has an end."""
    data = config[Data]
    if data.num_rollout is None and data.num_epoch is None:
        yield (
            "--num-rollout is required: how many rollouts to train on. --num-epoch counts passes over the prompts "
            "instead"
        )
    elif data.num_rollout is None and not data.rollout_global_dataset:
        yield (
            f"--num-epoch {data.num_epoch} cannot be counted with --disable-rollout-global-dataset, which reads no "
            "prompt data. Give --num-rollout"
        )
    start = config[Checkpoint].start_rollout_id
    if start is not None and data.num_rollout is not None and start >= data.num_rollout:
        yield f"--start-rollout-id {start} is not before --num-rollout {data.num_rollout}: nothing would be done"


def check_micro_batches(config: Config) -> Iterator[str]:
    """Micro-batches are bounded in one way."""
    data = config[Data]
    if data.use_dynamic_batch_size and data.max_tokens_per_gpu is None:
        yield "--use-dynamic-batch-size needs --max-tokens-per-gpu: the most tokens of one micro-batch"
    if data.use_dynamic_batch_size and config[Training].qkv_format == "bshd":
        yield (
            "--use-dynamic-batch-size counts tokens, and --qkv-format bshd pads samples to the longest one. Use "
            "--micro-batch-size with it"
        )
    algorithm = config[Algorithm]
    records = algorithm.use_routing_replay and not algorithm.use_rollout_routing_replay
    if data.log_probs_max_tokens_per_gpu is not None and records:
        yield (
            f"--log-probs-max-tokens-per-gpu {data.log_probs_max_tokens_per_gpu}: --use-routing-replay records the "
            "routing of the log-probability pass for the same micro-batches in training. Leave one of them out"
        )
