"""What the flags of the Megatron backend must fulfil together.  Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.cluster import Cluster
from miles.core.flags.lora import Lora
from miles.core.flags.training import Training
from miles.megatron.flags import Mtp, Parallelism, TransformerFlags
from miles.megatron.model_args import ModelArgs

if TYPE_CHECKING:
    from miles.core.config import Config


def layout_problems(config: Config) -> Iterator[str]:
    """Ranks divide as the flags say, and what was asked for exists."""
    parallel = config[Parallelism]
    yield from _division_problems(config, parallel)
    yield from _pipeline_problems(config, parallel)
    yield from _unsupported(config)
    yield from config[ModelArgs].unreadable()
    if parallel.expert_model_parallel_size > 1 < parallel.tensor_model_parallel_size and not parallel.sequence_parallel:
        yield (
            "--expert-model-parallel-size with --tensor-model-parallel-size needs --sequence-parallel: without it, "
            "Megatron-Core would send every token to the experts once per tensor-parallel rank"
        )


def _division_problems(config: Config, parallel: Parallelism) -> Iterator[str]:
    """The dense layers and the experts each divide the ranks in their own way."""
    cluster = config[Cluster]
    ranks = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
    pipeline = {"--pipeline-model-parallel-size": parallel.pipeline_model_parallel_size}
    dense = pipeline | {
        "--tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "--context-parallel-size": config[Training].context_parallel_size,
    }
    experts = pipeline | {
        "--expert-model-parallel-size": parallel.expert_model_parallel_size,
        "--expert-tensor-parallel-size": parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
    }
    for sizes in (dense, experts):
        product = math.prod(sizes.values())
        if ranks % product:
            text = " x ".join(f"{flag} {size}" for flag, size in sizes.items())
            yield (
                f"{text} makes {product}, which does not divide the {ranks} trainer ranks "
                "(--actor-num-nodes x --actor-num-gpus-per-node)"
            )


def _pipeline_problems(config: Config, parallel: Parallelism) -> Iterator[str]:
    if parallel.virtual_pipeline_model_parallel_size is None:
        return
    if parallel.pipeline_model_parallel_size == 1:
        yield (
            "--virtual-pipeline-model-parallel-size divides the stages of a pipeline, and there is none: "
            "give --pipeline-model-parallel-size"
        )


def _unsupported(config: Config) -> Iterator[str]:
    if config[Training].qkv_format == "bshd":
        yield "--qkv-format bshd: the megatron backend packs samples. Use thd, or --train-backend fsdp"
    if config[Mtp].enable_mtp_training and config[Mtp].mtp_num_layers is None:
        yield "--enable-mtp-training trains the layers that --mtp-num-layers counts: give it too"
    yield from _adapter_problems(config)
    pipelined = config[Parallelism].pipeline_model_parallel_size > 1
    if config[Algorithm].use_routing_replay and _given(config, "recompute_granularity") and pipelined:
        yield (
            "--use-routing-replay with --recompute-granularity and --pipeline-model-parallel-size: a stage computes "
            "micro-batches again after it has seen others, whose routing it would replay. Leave one of them out"
        )
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if any(_all_of(_given(config, name))):
            yield f"--{name.replace('_', '-')}: losses that balance experts are not trained; leave the flag out"


def _adapter_problems(config: Config) -> Iterator[str]:
    checkpoint, moves = config[Checkpoint], config[Algorithm].ref_update_interval is not None
    other = checkpoint.ref_load not in (None, checkpoint.hf_checkpoint)
    if config[Lora].lora_rank and moves and other:
        yield (
            f"--ref-load {checkpoint.ref_load} with --lora-rank and --ref-update-interval: checkpoints hold adapters "
            "alone, and the reference would have other weights under them. Leave one of the three out"
        )


def _given(config: Config, name: str) -> object:
    """The flag of a field of Megatron-Core's; None where it was not given, or no Megatron-Core is installed."""
    return getattr(config[TransformerFlags], name, None)


def _all_of(value: object) -> list[object]:
    """What a flag that takes one or several values was given."""
    return value if isinstance(value, list) else [value]
