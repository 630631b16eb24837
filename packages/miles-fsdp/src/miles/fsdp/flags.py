"""Flags of the FSDP backend.  Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from miles.core.config.group import Group


class Fsdp(Group):
    title = "FSDP Specific Arguments"

    dp_replicate_size: PositiveInt = 1
    """Copies of the sharded model (hybrid sharding): each is sharded over ``ranks / dp_replicate_size`` ranks, so that
    gathering weights stays within a machine."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    fsdp_cpu_offload: bool = False
    """Keep weights, gradients and optimizer in host memory; a layer's weights are on the accelerator while it computes,
    and the optimizer steps on the CPU."""

    fsdp_state_dict_cpu_offload: bool = False
    """Move every full weight to host memory as soon as it is gathered for the engines."""

    fsdp_cpu_backend: Literal["gloo"] | None = "gloo"
    """Communication library for tensors in host memory. ``--fsdp-cpu-offload`` and ``--async-save`` need it."""

    attn_implementation: Literal["flash_attention_2", "sdpa", "eager"] = "flash_attention_2"
    """Attention kernels. ``sdpa`` where flash attention cannot run (on the CPU, in fp32), unless given."""


GROUPS: tuple[type[Group], ...] = (Fsdp,)
