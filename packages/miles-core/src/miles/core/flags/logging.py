"""Where metrics go, and which are computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.core.config.group import Flag, Group


class Logging(Group):
    title = "Logging and Monitoring"

    use_wandb: bool = False
    """Log to Weights & Biases."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Mode of Weights & Biases. Wins over ``WANDB_MODE``."""

    wandb_project: str | None = None
    """Weights & Biases project."""

    wandb_group: str | None = None
    """Weights & Biases group."""

    wandb_team: str | None = None
    """Weights & Biases team (entity)."""

    wandb_host: str | None = None
    """Address of the Weights & Biases server."""

    wandb_key: Annotated[str | None, Flag(secret=True)] = None
    """Weights & Biases API key."""

    wandb_run_id: str | None = None
    """Weights & Biases run to continue."""

    wandb_run_name: str | None = None
    """Name of the Weights & Biases run. Defaults to the group."""

    wandb_dir: str | None = None
    """Directory of Weights & Biases' own files. Defaults to ``wandb`` in the run directory."""

    wandb_random_suffix: Annotated[bool, Flag(spelling="--disable-wandb-random-suffix", negates=True)] = True
    """Do not append random characters to the run's name."""

    wandb_always_use_train_step: bool = False
    """Count optimizer steps on the x-axis of every metric, instead of rollouts."""

    use_tensorboard: bool = False
    """Log to TensorBoard."""

    tb_project_name: str | None = None
    """First folder below the TensorBoard directory."""

    tb_experiment_name: str | None = None
    """Second folder below the TensorBoard directory."""

    tensorboard_dir: str | None = None
    """TensorBoard directory. Defaults to ``TENSORBOARD_DIR``, else ``tensorboard`` in the run directory."""

    tracker: Annotated[list[str], Flag(plugin="miles.trackers")] = Field(default_factory=list)
    """Further trackers, by entry point of ``miles.trackers`` or dotted path."""

    log_multi_turn: bool = False
    """Log statistics of turns and of tokens that were not generated."""

    log_passrate: bool = False
    """Log ``pass@k`` for k = 1, 2, 4 ... up to the samples per prompt."""

    log_correct_samples: bool = False
    """Log statistics of the samples with a full reward by themselves."""

    log_reward_category: str | None = None
    """Key of the reward mapping whose values are counted and logged, for example the reason of a zero."""
