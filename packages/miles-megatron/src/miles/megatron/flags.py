"""Flags of the Megatron backend.  Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from miles.core.config.group import Group
from miles.core.flags import GROUPS as CORE_GROUPS
from miles.megatron.dataclass_flags import flag_group
from miles.megatron.model_args import ModelArgs


class Megatron(Group):
    title = "Megatron Specific Arguments"

    megatron_to_hf_mode: Literal["raw", "bridge"] = "raw"
    """Both mean the same: Miles' own tables convert weights of the families that it knows, to and from Hugging Face
    directories, without a script or constants for a model. ``bridge`` is taken from launch scripts that were written
    for Megatron-Bridge; that package is not used, and a model that only it knows is refused."""

    spec: list[str] | None = None
    """Layers of the user's own: module and name of a layer spec of Megatron-Core, or of a function that makes it from
    ``(args, config, vp_stage)``. Their parameters must have the names that the model's map knows."""

    make_vocab_size_divisible_by: PositiveInt = 128
    """Rows of the vocabulary on each tensor-parallel rank are padded to a multiple of this, unless the vocabulary is
    too small to give every rank some."""


class Parallelism(Group):
    title = "Megatron Parallelism"

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every layer."""

    sequence_parallel: bool = False
    """Divide activations between the layers among the tensor-parallel ranks too."""

    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are divided into."""

    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Parts of the model that each stage holds (interleaved schedule)."""

    expert_model_parallel_size: PositiveInt = 1
    """Ranks that the experts of a layer are divided among."""

    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share every expert. Defaults to ``--tensor-model-parallel-size``."""

    use_distributed_optimizer: bool = True
    """Divide the optimizer's state among data-parallel ranks."""

    accumulate_allreduce_grads_in_fp32: bool = True
    """Sum gradients over micro-batches and ranks in fp32; otherwise in the precision of the weights, in half the
    memory."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""

    overlap_param_gather: bool = False
    """Gather updated weights of the distributed optimizer while the next forward pass goes on, between the optimizer
    steps of a rollout. After the last step they are gathered at once, for all who read them."""


class Mtp(Group):
    title = "Multi-Token Prediction (MTP) Arguments"

    enable_mtp_training: bool = False
    """Train the multi-token-prediction layers on the rollouts beside the policy, which learns nothing from it."""

    mtp_num_layers: PositiveInt | None = None
    """Multi-token-prediction layers of the checkpoint to hold, send to engines and save; None: it may have some, which
    are left out."""

    mtp_loss_scaling_factor: NonNegativeFloat = 0.2
    """Weight of the multi-token-prediction loss."""


_OWN: tuple[type[Group], ...] = (Megatron, ModelArgs, Parallelism, Mtp)
# What a run derives or decides itself.
_DECIDED = {
    "use_cpu_initialization",
    "perform_initialization",
    "params_dtype",
    "bf16",
    "calculate_per_token_loss",
    "variable_seq_lengths",
    "timers",
    "moe_enable_routing_replay",
    "config_logger_dir",
}
_TAKEN = _DECIDED.union(*(group.model_fields for group in (*CORE_GROUPS, *_OWN)))

TransformerFlags = flag_group("TransformerFlags", "Megatron-Core Configuration", _TAKEN)

GROUPS: tuple[type[Group], ...] = (*_OWN, TransformerFlags)
