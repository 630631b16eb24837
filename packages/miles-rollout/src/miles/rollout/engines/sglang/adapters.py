"""What SGLang servers are started with so that they can add the policy's adapter.  Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.cluster import Cluster
from miles.core.flags.debug import Debug
from miles.core.flags.lora import Lora
from miles.core.flags.training import Training
from miles.rollout.flags import Engines

if TYPE_CHECKING:
    from miles.core.config import Config

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def adapter_options(config: Config) -> dict[str, Any]:
    """Arguments of the servers; none where they get whole weights.

    ``auto`` asks for adapters on a CPU only: what they cost and how they round was not seen on accelerators.
    """
    lora, on_accelerator = config[Lora], config[Training].device == "cuda"
    if config[Engines].rollout_engine != "sglang" or not lora.lora_rank or lora.lora_serving == "merged":
        return {}
    modules = _modules(config[Checkpoint].hf_checkpoint, lora.target_modules)
    unwanted = on_accelerator or adapter_obstacle(config) is not None
    if not modules or (lora.lora_serving == "auto" and unwanted):
        return {}
    options = {
        "enable_lora": True,
        "max_lora_rank": lora.lora_rank,
        "lora_target_modules": modules,
        "max_loras_per_batch": 2,  # the policy's, and the model without it
    }
    return options if on_accelerator else options | {"lora_backend": "torch_native"}


def adapter_obstacle(config: Config) -> str | None:
    """Which flag keeps SGLang from taking adapters, or from holding the model under one through the run."""
    transport = config[Training].update_weight_transport
    if transport not in ("auto", "shm"):
        return f"--update-weight-transport {transport}: adapters come through shared memory"
    if config[Cluster].prefill_num_servers:
        return "--prefill-num-servers: adapters were not tried on servers that share a request"
    if config[Cluster].offload_rollout:
        return "--offload-rollout: servers give up the memory of the model under the adapter"
    if config[Debug].check_weight_update_equal:
        return "--check-weight-update-equal: its check of servers fills the model under the adapter with noise"
    return None


def _modules(checkpoint: str | None, targets: list[str]) -> list[str]:
    """The linear layers that may get adapters, of those that SGLang adapts in every decoder of the common family."""
    path = Path(checkpoint or "") / "config.json"
    shape = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if shape.get("kv_lora_rank"):  # latent attention
        return []
    sparse = shape.get("num_experts") or shape.get("num_local_experts") or shape.get("n_routed_experts")
    known = _ATTENTION if sparse else _ATTENTION + _FEED_FORWARD
    named = {target.rpartition(".")[2] for target in targets}
    return [name for name in known if targets == ["all-linear"] or name in named]
