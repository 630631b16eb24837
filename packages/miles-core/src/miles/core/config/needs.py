"""Flags that do nothing without another one.  What does nothing is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miles.core.config.discover import flag_table

if TYPE_CHECKING:
    from miles.core.config.config import Config

NEEDS: dict[str, tuple[str, ...]] = {
    "save_interval": ("save",),
    "save_hf": ("save",),
    "update_weights_interval": ("async_training",),
    "no_save_optim": ("save",),
    "critic_save": ("save",),
    "max_tokens_per_gpu": ("use_dynamic_batch_size",),
    "log_probs_max_tokens_per_gpu": ("use_dynamic_batch_size",),
    "kl_loss_coef": ("use_kl_loss",),
    "use_unbiased_kl": ("use_kl_loss",),
    "tis_clip": ("use_tis", "get_mismatch_metrics"),
    "tis_clip_low": ("use_tis", "get_mismatch_metrics"),
    "custom_tis_function_path": ("use_tis", "use_rs", "get_mismatch_metrics"),
    "ci_kl_checker": ("ci_test",),
    "profile_target": ("use_pytorch_profiler",),
    "profile_step_start": ("use_pytorch_profiler",),
    "profile_step_end": ("use_pytorch_profiler",),
    "profile_dir": ("use_pytorch_profiler",),
    "memory_snapshot_path": ("record_memory_history",),
    "memory_snapshot_dir": ("record_memory_history",),
    "memory_snapshot_num_steps": ("record_memory_history",),
    "memory_recorder": ("record_memory_history",),
    "opd_kl_coef": ("use_opd",),
    "opsm_delta": ("use_opsm",),
    "load_debug_rollout_data_subsample": ("load_debug_rollout_data",),
    "apply_chat_template_kwargs": ("apply_chat_template",),
    "wandb_mode": ("use_wandb",),
    "wandb_project": ("use_wandb",),
    "wandb_group": ("use_wandb",),
    "wandb_team": ("use_wandb",),
    "wandb_host": ("use_wandb",),
    "wandb_key": ("use_wandb",),
    "wandb_run_id": ("use_wandb",),
    "wandb_run_name": ("use_wandb",),
    "wandb_dir": ("use_wandb",),
    "wandb_always_use_train_step": ("use_wandb",),
    "tb_project_name": ("use_tensorboard",),
    "tb_experiment_name": ("use_tensorboard",),
    "tensorboard_dir": ("use_tensorboard",),
}
"""Field by field: it has an effect when one of these is set."""


def check_needs(config: Config) -> Iterator[str]:
    """Every flag that was given has something to act on."""
    table = flag_table()
    for name, needed in NEEDS.items():
        given = config.origin[name] in ("flag", "file") and getattr(config, name) != table.flags[name].default
        if given and not any(getattr(config, other) for other in needed):
            spelling = table.flags[name].spelling
            others = " or ".join(table.flags[other].spelling for other in needed)
            yield f"{spelling} has no effect without {others}. Add it, or leave {spelling} out"
