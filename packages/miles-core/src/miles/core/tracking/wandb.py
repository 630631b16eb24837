"""Weights & Biases.  Needs ``wandb`` (``miles-core[wandb]``)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wandb

from miles.core.errors import ConfigError
from miles.core.flags.logging import Logging
from miles.core.run_directory import RunDirectory

if TYPE_CHECKING:
    from miles.core.config import Config

AXES = {
    "rollout": ("rollout", "perf", "multi_turn", "passrate"),
    "train": ("train",),
    "eval": ("eval",),
}
"""Families of metrics that each kind of event carries; ``KIND/step`` is their horizontal axis."""


class WandbTracker:
    """One W&B run for the whole life of a Miles run: a run that continues keeps its id."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        flags = config[Logging]
        run_id = flags.wandb_run_id or remembered_id(run_dir)
        if flags.wandb_key:
            wandb.login(key=flags.wandb_key, host=flags.wandb_host)
        group = flags.wandb_group
        if group and flags.wandb_random_suffix:
            group = f"{group}_{run_id}"
        self._run = _init(
            project=flags.wandb_project,
            entity=flags.wandb_team,
            group=group,
            name=config.wandb_run_name,
            id=run_id,
            resume="allow",
            mode=flags.wandb_mode,
            dir=flags.wandb_dir or str(run_dir),
            config=RunDirectory(run_dir).read_config(),
            settings=wandb.Settings(base_url=flags.wandb_host) if flags.wandb_host else None,
        )
        for kind, families in AXES.items():
            for family in families:
                self._run.define_metric(f"{family}/*", step_metric=f"{kind}/step")
        self._train_steps = train_steps_per_rollout(config) if flags.wandb_always_use_train_step else None

    def log(self, metrics: Mapping[str, float], *, step: int, kind: str, rollout_id: int) -> None:
        """Send one event with the step of its kind."""
        if self._train_steps is not None and kind != "train":
            step = rollout_id * self._train_steps
        self._run.log({f"{kind}/step": step, **metrics})

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def _init(**options: Any) -> wandb.Run:
    """``wandb.init``; ConfigError when it has no key, or no server answers."""
    try:
        return wandb.init(**options)
    except wandb.errors.Error as error:
        raise ConfigError(f"--use-wandb: {error} (--wandb-key, or --wandb-mode offline)") from None


def remembered_id(run_dir: Path) -> str:
    """The id of this run directory's W&B run, made up the first time."""
    path = run_dir / "wandb_run_id.txt"
    if not path.is_file():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def train_steps_per_rollout(config: Config) -> int:
    """Optimizer steps that one rollout feeds."""
    samples: int = config.rollout_batch_size * config.n_samples_per_prompt
    return samples // int(config.global_batch_size)
