"""Where a run starts: fresh, or at a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miles.core.driver import checkpoint
from miles.core.driver.weights_only import has_weights_only
from miles.core.errors import ConfigError
from miles.core.flags.checkpoint import Checkpoint as CheckpointFlags


@dataclass(frozen=True, slots=True)
class Start:
    """Where to go on."""

    checkpoint: checkpoint.Checkpoint | None = None
    """What to restore; None: nothing, the run is new."""
    first_rollout: int = 0
    metrics_offset: int = 0
    """Bytes of ``metrics.jsonl`` that stay."""

    def train_steps(self, per_rollout: int) -> int:
        """Optimizer steps before the first rollout: as counted, or ``per_rollout`` of each earlier one."""
        found = self.checkpoint
        if found is not None and found.state.rollout_id + 1 == self.first_rollout and found.state.train_steps:
            return found.state.train_steps
        return self.first_rollout * per_rollout

    def check_debug_data(self, pattern: str | None, num_rollout: int | None) -> None:
        """ConfigError when the samples of the first rollout (``--load-debug-rollout-data``) are not there.

        A run that has done all its ``num_rollout`` needs none.
        """
        if pattern is None or self.first_rollout == num_rollout:
            return
        path = Path(pattern.format(rollout_id=self.first_rollout))
        if not path.is_file():
            raise ConfigError(
                f"--load-debug-rollout-data {pattern}: there is no {path}, which the first rollout of this run, "
                f"{self.first_rollout}, would be read from"
            )

    def check_length(self, num_rollout: int | None) -> None:
        """ConfigError when the run has gone further than it is told to go now; None: that is not known yet."""
        if num_rollout is not None and self.first_rollout > num_rollout:
            raise ConfigError(
                f"--num-rollout {num_rollout}: the model has been trained on {self.first_rollout} rollouts already "
                f"({self.checkpoint.path if self.checkpoint else '--start-rollout-id'}). Give at least as many, or "
                "start a new run in another --save"
            )


def find(flags: CheckpointFlags, run_dir: Path) -> Start:
    """The verified checkpoint to go on from, or a fresh start.

    What the run itself has written comes first, so the same command continues what it began; ``--start-rollout-id``
    says where that began.  Otherwise ``--load`` says where to start.  What holds weights only starts a new run, of
    anything else there must be a checkpoint: training from the start when the user asked to resume would lose days.
    """
    own = checkpoint.latest(run_dir, skip_broken=flags.skip_broken_checkpoints)
    if own is not None:
        return Start(own, own.state.rollout_id + 1, own.state.metrics_offset)
    load = flags.load
    if load is None or Path(load).absolute() == run_dir.absolute() or has_weights_only(Path(load)):
        return Start(None, flags.start_rollout_id or 0)
    found = checkpoint.latest(Path(load), skip_broken=flags.skip_broken_checkpoints)
    if found is None:
        raise ConfigError(
            f"--load {load}: no {checkpoint.TRACKER_FILE} there, so there is nothing to resume from, and no model. "
            "Name a run directory that holds a checkpoint, or leave --load out to start from --hf-checkpoint"
        )
    typed = flags.start_rollout_id
    return Start(found, found.state.rollout_id + 1 if typed is None else typed)
