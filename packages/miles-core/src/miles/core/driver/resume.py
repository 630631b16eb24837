"""Where a run starts: fresh, or at a checkpoint."""

from __future__ import annotations

from pathlib import Path

from miles.core.driver import checkpoint
from miles.core.errors import ConfigError
from miles.core.flags.checkpoint import Checkpoint as CheckpointFlags


def find(flags: CheckpointFlags, run_dir: Path) -> checkpoint.Checkpoint | None:
    """The verified checkpoint to go on from; None for a fresh start.

    What the run itself has written comes first, so the same command continues what it began.  Otherwise ``--load`` says
    where to start, and must hold a checkpoint: training from the start when the user asked to resume would lose days.
    """
    own = checkpoint.latest(run_dir)
    if own is not None or flags.load is None or Path(flags.load).absolute() == run_dir.absolute():
        return own
    found = checkpoint.latest(Path(flags.load))
    if found is None:
        raise ConfigError(
            f"--load {flags.load}: no {checkpoint.TRACKER_FILE} there, so there is nothing to resume from. Name a run "
            "directory that holds a checkpoint, or leave --load out to start from --hf-checkpoint"
        )
    return found
