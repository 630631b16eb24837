"""What follows from the flags of the FSDP backend.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from miles.core.config.draft import Draft
from miles.core.driver.weights_only import has_release
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.cluster import Cluster
from miles.core.flags.lora import Lora
from miles.core.flags.training import Training
from miles.fsdp.flags import Fsdp

if TYPE_CHECKING:
    from miles.core.config import Config


def derive_attention(draft: Draft) -> None:
    """PyTorch's flash attention computes in half precision on an accelerator; SDPA runs everywhere."""
    if draft["qkv_format"] == "bshd":
        draft.derive("attn_implementation", "sdpa", "--qkv-format bshd runs the model's own attention")
    elif draft["device"] == "cpu" or draft["train_dtype"] == "fp32":
        draft.derive("attn_implementation", "sdpa", "flash attention needs an accelerator and bf16")


DERIVATIONS: tuple[Callable[[Draft], None], ...] = (derive_attention,)


def check_attention(config: Config) -> Iterator[str]:
    """Flash attention can run where it is asked for."""
    training = config[Training]
    if training.train_backend != "fsdp" or config[Fsdp].attn_implementation != "flash_attention_2":
        return
    if training.qkv_format == "bshd":
        yield (
            "--attn-implementation flash_attention_2 takes packed samples, and --qkv-format bshd does not pack them. "
            "Use sdpa or eager there"
        )
    elif training.device == "cpu" or training.train_dtype == "fp32":
        yield (
            "--attn-implementation flash_attention_2 computes in bf16 on an accelerator, but the trainer uses "
            f"--device {training.device} and --train-dtype {training.train_dtype}. Use sdpa or eager there"
        )


def check_formats(config: Config) -> Iterator[str]:
    """Weights are in a format that transformers reads."""
    checkpoint = config[Checkpoint]
    named = {"--load": checkpoint.load, "--ref-load": checkpoint.ref_load, "--critic-load": checkpoint.critic_load}
    for flag, path in named.items():
        if config[Training].train_backend == "fsdp" and path is not None and has_release(Path(path)):
            yield (
                f"{flag} {path} holds converted weights (torch_dist), which the fsdp backend does not read. Give the "
                "Hugging Face directory they were made from, or what tools/convert_torch_dist_to_hf.py makes of them"
            )


def check_replicas(config: Config) -> Iterator[str]:
    """Ranks divide into equal replicas."""
    cluster, replicas = config[Cluster], config[Fsdp].dp_replicate_size
    ranks = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
    if config[Training].train_backend == "fsdp" and ranks % replicas:
        yield (
            f"--dp-replicate-size {replicas} does not divide the {ranks} trainer ranks "
            "(--actor-num-nodes x --actor-num-gpus-per-node). Use a divisor of them"
        )


def check_context(config: Config) -> Iterator[str]:
    """Ranks divide into groups that share samples, and no function of the user's is shown a part of one."""
    cluster, size = config[Cluster], config[Training].context_parallel_size
    if config[Training].train_backend != "fsdp" or size == 1:
        return
    ranks = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
    if ranks % size:
        yield (
            f"--context-parallel-size {size} does not divide the {ranks} trainer ranks "
            "(--actor-num-nodes x --actor-num-gpus-per-node). Use a divisor of them"
        )
    for flag, path in _functions_of_whole_samples(config[Algorithm]).items():
        yield (
            f"{flag} {path} is called with whole samples, and with --context-parallel-size {size} every rank has a "
            "part of each. Leave one of the two out"
        )


def _functions_of_whole_samples(algorithm: Algorithm) -> dict[str, str]:
    """The user's functions in the loss, by flag.  Corrections that are installed by name know of parts."""
    correction = algorithm.custom_tis_function_path
    paths = {
        "--custom-loss-function-path": algorithm.custom_loss_function_path,
        "--custom-pg-loss-reducer-function-path": algorithm.custom_pg_loss_reducer_function_path,
        "--custom-tis-function-path": correction if correction and "." in correction else None,
    }
    return {flag: path for flag, path in paths.items() if path}


def check_layout(config: Config) -> Iterator[str]:
    """Rows of single samples have ranks that hold them whole."""
    training = config[Training]
    if training.train_backend != "fsdp" or training.qkv_format == "thd":
        return
    if training.context_parallel_size > 1:
        yield (
            f"--qkv-format bshd keeps samples whole, and --context-parallel-size {training.context_parallel_size} "
            "gives every rank a part of each. Use thd there"
        )


def check_true_on_policy(config: Config) -> Iterator[str]:
    """The engine's arithmetic runs on the CPU, over whole samples, and gives log-probabilities."""
    training = config[Training]
    if not training.true_on_policy_mode:
        return
    obstacles = {
        f"--train-backend {training.train_backend}": training.train_backend != "fsdp",
        f"--device {training.device}": training.device != "cpu",
        f"--context-parallel-size {training.context_parallel_size}": training.context_parallel_size > 1,
        "--loss-type custom_loss": config[Algorithm].loss_type == "custom_loss",
        "asynchronous training": training.async_training,
    }
    for obstacle in (obstacle for obstacle, present in obstacles.items() if present):
        yield (
            f"--true-on-policy-mode contradicts {obstacle}: it takes --train-backend fsdp on the CPU, whole samples, a "
            "loss of log-probabilities, and engines with the weights that train"
        )


def check_lora(config: Config) -> Iterator[str]:
    """Adapters have a rank, and a backend that trains them."""
    lora, backend = config[Lora], config[Training].train_backend
    if lora.lora_rank and backend not in ("fsdp", "megatron"):
        yield f"--lora-rank {lora.lora_rank}: the {backend} backend trains no adapters. Use --train-backend fsdp"
    if lora.lora_adapter_path is not None and not lora.lora_rank:
        yield f"--lora-adapter-path {lora.lora_adapter_path} needs --lora-rank, the rank of that adapter"


def check_memory(config: Config) -> Iterator[str]:
    """What is moved out of an accelerator's memory is in one; and half precision has a backend that scales losses."""
    training, fsdp = config[Training], config[Fsdp]
    if training.fp16 and training.train_dtype != "fp16":
        yield f"--fp16 and --train-dtype {training.train_dtype} contradict each other. Give one of them"
    if training.train_dtype == "fp16" and training.train_backend not in ("fsdp", "megatron"):
        yield f"--train-dtype fp16: the {training.train_backend} backend scales no losses. Use --train-backend fsdp"
    offloads = {
        "--fsdp-cpu-offload": fsdp.fsdp_cpu_offload,
        "--fsdp-state-dict-cpu-offload": fsdp.fsdp_state_dict_cpu_offload,
    }
    for flag in (flag for flag, given in offloads.items() if given and training.device == "cpu"):
        yield f"{flag} moves weights to host memory, where --device cpu has them anyway. Leave it out"
    if fsdp.fsdp_cpu_offload and fsdp.fsdp_cpu_backend is None:
        yield "--fsdp-cpu-offload exchanges tensors in host memory, which needs --fsdp-cpu-backend gloo"


def check_routing(config: Config) -> Iterator[str]:
    """Models of transformers choose their experts themselves."""
    if config[Training].train_backend != "fsdp":
        return
    algorithm = config[Algorithm]
    if algorithm.use_routing_replay or algorithm.use_rollout_routing_replay:
        flag = "--use-rollout-routing-replay" if algorithm.use_rollout_routing_replay else "--use-routing-replay"
        yield f"{flag}: the fsdp backend replays no recorded routing. Use --train-backend megatron"


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    check_attention,
    check_formats,
    check_replicas,
    check_context,
    check_layout,
    check_true_on_policy,
    check_lora,
    check_memory,
    check_routing,
)
