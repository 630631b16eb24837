"""What follows from the core's own flags.  A value that the user gave is never changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from miles.core import hardware
from miles.core.config.batch import complete_batch
from miles.core.config.draft import Draft, Origin
from miles.core.config.offloading import derive_offloading
from miles.core.errors import PluginError
from miles.core.registry import Registry

TRAIN_BACKENDS = Registry("miles.train_backends")


def derive_backend_defaults(draft: Draft) -> None:
    """Values that the training backend prefers.  A backend that cannot be loaded is reported by the checks."""
    backend = draft["train_backend"]
    try:
        defaults = TRAIN_BACKENDS.get(backend)().defaults()
    except PluginError:
        defaults = {}
    for name, value in defaults.items():
        draft.derive(name, value, f"the default of --train-backend {backend}", Origin.BACKEND)


def derive_device(draft: Draft) -> None:
    """``auto`` becomes what this machine has; the CPU brings its own precision and communication library."""
    if draft["device"] == "auto":
        _replace(draft, "device", "cuda" if hardware.num_accelerators() else "cpu", "what this machine has")
    on_cpu = draft["device"] == "cpu"
    if draft["train_dtype"] == "auto" and draft["fp16"]:
        _replace(draft, "train_dtype", "fp16", "--fp16")
    if draft["train_dtype"] == "auto":
        _replace(draft, "train_dtype", "fp32" if on_cpu else "bf16", f"--device {draft['device']}")
    if on_cpu:
        draft.derive("distributed_backend", "gloo", "--device cpu")
        draft.derive("data_pad_size_multiplier", 1, "--device cpu: its kernels take any size")
        draft.derive("actor_num_gpus_per_node", 1, "--device cpu: one trainer process unless more are asked for")


def derive_data_dumps(draft: Draft) -> None:
    """``--dump-details`` names the dumps that are not named; loaded samples leave nothing to generate."""
    if directory := draft["dump_details"]:
        path = PurePath(directory) / "rollout_data" / "{rollout_id}.jsonl"
        draft.derive("save_debug_rollout_data", str(path), f"--dump-details {directory}")
        path = PurePath(directory) / "train_data" / "{rollout_id}_{rank}.safetensors"
        draft.derive("save_debug_train_data", str(path), f"--dump-details {directory}")
    if draft["load_debug_rollout_data"]:
        draft.derive("debug_train_only", True, "--load-debug-rollout-data replaces the engines")


def derive_rollout_gpus(draft: Draft) -> None:
    """Engines that share the trainer's accelerators have as many as it has."""
    if draft["colocate"]:
        total = draft["actor_num_nodes"] * draft["actor_num_gpus_per_node"]
        draft.derive("rollout_num_gpus", total, "--colocate: the accelerators of the trainer")


def derive_algorithm(draft: Draft) -> None:
    """Settings that others make meaningless."""
    if draft["n_samples_per_prompt"] == 1:
        draft.derive("grpo_std_normalization", False, "a group of one sample has no standard deviation")
    if draft["use_rollout_routing_replay"]:
        draft.derive("use_routing_replay", True, "--use-rollout-routing-replay")
    if draft["loss_type"] == "sft_loss":
        draft.derive("compute_advantages_and_returns", False, "--loss-type sft_loss needs no advantages")


def derive_schedule(draft: Draft) -> None:
    """The decay of a backend that states none, and the warm-up under its other name."""
    if draft.typed("warmup_ratio"):
        draft.derive("lr_warmup_fraction", draft["warmup_ratio"], f"--warmup-ratio {draft['warmup_ratio']}")
    if draft["lr_decay_style"] is None:
        style = "linear" if draft["train_backend"] == "megatron" else "constant"
        draft.derive(
            "lr_decay_style", style, f"the default of --train-backend {draft['train_backend']}", Origin.BACKEND
        )


def _replace(draft: Draft, name: str, value: str, reason: str) -> None:
    """Put a concrete value in the place of ``auto``, typed or not."""
    draft.set(name, value, Origin.DERIVED, reason)


DERIVATIONS: tuple[Callable[[Draft], None], ...] = (
    derive_backend_defaults,
    derive_device,
    derive_data_dumps,
    complete_batch,
    derive_rollout_gpus,
    derive_offloading,
    derive_algorithm,
    derive_schedule,
)
