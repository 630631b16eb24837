"""The small files of a training state: JSON for counters, safetensors for random generators."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from miles.core.errors import CheckpointError
from miles.core.flags.optimizer import Optimizer
from miles.core.protocols.backend import Rank
from miles.core.training.schedule import LearningRate

_FORMAT = 1
_COUNTERS = "state.json"


@dataclass(frozen=True, slots=True)
class Counters:
    """Where training stands."""

    steps_done: int
    """Optimizer steps."""
    world_size: int
    has_optimizer: bool
    schedule: dict[str, Any] | None = None
    """Fields of the ``LearningRate``; None in checkpoints that did not keep them."""
    kept_versions: tuple[int, ...] = ()
    """Older weights that are part of the state, by their versions (``--keep-old-actor``)."""

    def resumed_schedule(self, current: LearningRate, flags: Optimizer) -> LearningRate:
        """The schedule to go on with: the command line's, ``current``, or the checkpoint's."""
        if self.schedule is None:
            return current
        before = LearningRate(**self.schedule)
        if flags.use_checkpoint_lr_scheduler:
            return before
        if not flags.override_lr_scheduler and not current.agrees(before, since=self.steps_done):
            logging.getLogger(__name__).warning(
                "the learning-rate schedule is no longer that of the checkpoint: %s, was %s. "
                "--use-checkpoint-lr-scheduler goes on with the old one, --override-lr-scheduler says that the new one "
                "is meant",
                current,
                before,
            )
        return current


def write_progress(directory: Path, rank: Rank, counters: Counters) -> None:
    """Where training stands, and this rank's random generators."""
    save_file(_generators(), _generators_of(directory, rank))
    if rank.rank != 0:
        return
    text = json.dumps({"format": _FORMAT, **asdict(counters)}, indent=2)
    (directory / _COUNTERS).write_text(text + "\n", encoding="utf-8")


def read_counters(directory: Path, *, with_optimizer: bool) -> Counters:
    """Those of ``write_progress``.  CheckpointError where ``with_optimizer`` wants a state that was left out."""
    path = directory / _COUNTERS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if values.pop("format", None) != _FORMAT:
        raise CheckpointError(f"{path} has a format that this version does not read (it reads format {_FORMAT})")
    counters = Counters(**values)
    if with_optimizer and not counters.has_optimizer:
        raise CheckpointError(
            f"{directory} was saved with --no-save-optim and has no optimizer state to go on with. "
            "Give --no-save-optim to go on with a fresh optimizer, or start a new run from its Hugging Face export"
        )
    return counters


def restore_generators(directory: Path, rank: Rank, counters: Counters) -> None:
    """Put back this rank's random generators; among another number of ranks than saved them, nobody's are these."""
    if counters.world_size != rank.world_size:
        return
    states = load_file(_generators_of(directory, rank))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _generators_of(directory: Path, rank: Rank) -> Path:
    return directory / f"rng-{rank.rank}.safetensors"


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
