"""Directories that hold a model's weights, and no state of a run that could be resumed."""

from __future__ import annotations

import json
from pathlib import Path

from miles.core.driver.checkpoint import TRACKER_FILE
from miles.core.flags.checkpoint import Checkpoint

RELEASE = "release"
"""What the tracker of converted weights has in the place of an iteration; also the name of their directory."""


def has_release(directory: Path) -> bool:
    """Whether ``convert_hf_to_torch_dist`` has written weights to ``directory``."""
    tracker = directory / TRACKER_FILE
    return tracker.is_file() and tracker.read_text(encoding="utf-8", errors="replace").strip() == RELEASE


def has_weights_only(directory: Path) -> bool:
    """Whether ``directory`` is a model in Hugging Face format or a release; a run directory is neither."""
    return has_release(directory) or (not (directory / TRACKER_FILE).is_file() and _is_hf(directory))


def starting_weights(flags: Checkpoint) -> Path:
    """What a new run's actor begins as: ``--load`` where that has weights only, ``--hf-checkpoint`` otherwise."""
    load = flags.load
    return Path(load if load is not None and has_weights_only(Path(load)) else flags.hf_checkpoint or "")


def _is_hf(directory: Path) -> bool:
    """Whether the ``config.json`` in it is a model's; run directories have one too."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config
