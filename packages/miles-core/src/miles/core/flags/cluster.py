"""Machines, processes and who shares an accelerator with whom."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeInt, PositiveInt

from miles.core.config.group import DERIVED, Flag, Group


class Cluster(Group):
    title = "Cluster and Resource Management"

    executor: Literal["auto", "local", "ray"] = "auto"
    """Where the roles of a run live. ``local``: processes of this machine, one rank each, no Ray. ``ray``: a Ray
    cluster. ``auto``: local when every role has one rank and no cluster address is given."""

    ray_address: str | None = None
    """Address of a running Ray cluster (``host:port`` or ``auto``). Without it ``--executor ray`` starts one on this
    machine."""

    actor_num_nodes: PositiveInt = 1
    """Number of nodes for training the actor."""

    actor_num_gpus_per_node: PositiveInt = 8
    """Accelerators per node for training the actor; one rank each. On a machine without accelerators: trainer
    processes, and 1 unless given."""

    critic_num_nodes: Annotated[PositiveInt, Flag(inherits="actor_num_nodes")] = DERIVED
    """Number of nodes for training the critic. Defaults to ``--actor-num-nodes``."""

    critic_num_gpus_per_node: Annotated[PositiveInt, Flag(inherits="actor_num_gpus_per_node")] = DERIVED
    """Accelerators per node for training the critic, one rank each. They are the critic's own, beside the actor's; one
    process trains both with ``--executor local``. Defaults to ``--actor-num-gpus-per-node``."""

    rollout_num_gpus: NonNegativeInt | None = None
    """Accelerators for rollout, all engines together. With ``--colocate`` these are the trainer's. On a machine
    without accelerators they count engines' shares only."""

    rollout_num_gpus_per_engine: PositiveInt = 1
    """Accelerators of one engine: its tensor-parallel size, over all its nodes."""

    num_gpus_per_node: PositiveInt = 8
    """Accelerators of one machine."""

    colocate: bool = False
    """Train and generate on the same accelerators, by turns: see ``--offload-train`` and ``--offload-rollout``."""

    offload: bool = False
    """Same as ``--offload-train`` and ``--offload-rollout``."""

    offload_train: bool | None = None
    """Move actor and critic (weights, gradients, optimizer) to host memory while responses are generated. Given by
    ``--colocate`` on accelerators; ``--no-offload-train`` takes that back. With ``--device cpu`` everything is in
    host memory anyway: fsdp moves nothing, megatron moves it within host memory, as a rehearsal that counts the bytes
    (``perf/trainer_offloaded_bytes``)."""

    offload_rollout: bool | None = None
    """Release the engines' memory while actor and critic train: keys and values, and the weights, which the next update
    sends again (with ``--update-weight-delta`` engines keep them). Given by ``--colocate`` on accelerators;
    ``--no-offload-rollout`` takes that back. The embedded engine really frees it; SGLang does on accelerators, and does
    nothing on a CPU."""

    prefill_num_servers: PositiveInt | None = None
    """Engines, of all there are, that compute the keys and values of prompts for the others, which decode
    (disaggregated prefill and decode). For SGLang; ``--sglang-disaggregation-transfer-backend`` says how keys and
    values travel."""

    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    """Communication library of the trainer's ranks. ``gloo`` on the CPU unless given."""

    distributed_timeout_minutes: PositiveInt = 10
    """Minutes after which a collective operation that does not end is an error."""
