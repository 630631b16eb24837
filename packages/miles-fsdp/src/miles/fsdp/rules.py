"""What follows from the flags of the FSDP backend.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from miles.core.config.draft import Draft
from miles.core.flags.cluster import Cluster
from miles.core.flags.training import Training
from miles.fsdp.flags import Fsdp

if TYPE_CHECKING:
    from miles.core.config import Config


def derive_attention(draft: Draft) -> None:
    """PyTorch's flash attention computes in half precision on an accelerator; SDPA runs everywhere."""
    if draft["device"] == "cpu" or draft["train_dtype"] == "fp32":
        draft.derive("attn_implementation", "sdpa", "flash attention needs an accelerator and bf16")


DERIVATIONS: tuple[Callable[[Draft], None], ...] = (derive_attention,)


def check_attention(config: Config) -> Iterator[str]:
    """Flash attention can run where it is asked for."""
    training = config[Training]
    if training.train_backend != "fsdp" or config[Fsdp].attn_implementation != "flash_attention_2":
        return
    if training.device == "cpu" or training.train_dtype == "fp32":
        yield (
            "--attn-implementation flash_attention_2 computes in bf16 on an accelerator, but the trainer uses "
            f"--device {training.device} and --train-dtype {training.train_dtype}. Use sdpa or eager there"
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


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (check_attention, check_replicas)
