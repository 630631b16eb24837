"""Flags of the FSDP backend.  Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

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


class Lora(Group):
    title = "LoRA Arguments"

    lora_rank: NonNegativeInt = 0
    """Train adapters of this rank instead of the whole model; 0: the whole model. Engines get weights with the adapters
    added, checkpoints hold the adapters alone, and ``--save-hf`` writes both the sum and the adapter (PEFT format, in
    ``adapter/``)."""

    lora_alpha: PositiveFloat = 16.0
    """Adapters are scaled by ``lora_alpha / lora_rank``."""

    target_modules: list[str] = Field(default_factory=lambda: ["all-linear"])
    """Linear layers that get an adapter, by the last part of their name (``q_proj``) or more of it. ``all-linear``: all
    of the decoder."""

    exclude_modules: list[str] = Field(default_factory=list)
    """Layers that get none although ``--target-modules`` names them."""

    lora_adapter_path: str | None = None
    """Adapter in PEFT format to start from. The reference model starts without it."""


GROUPS: tuple[type[Group], ...] = (Fsdp, Lora)
