"""TensorBoard.  Needs ``tensorboard`` (``miles-core[tensorboard]``)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from miles.core import environ
from miles.core.flags.logging import Logging
from miles.core.run_directory import RunDirectory
from miles.core.tracking.jsonl import read_records

if TYPE_CHECKING:
    from miles.core.config import Config


class TensorboardTracker:
    """Writes event files.

    A run that continues writes its history anew from ``metrics.jsonl``, so that the curves hold no step twice.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        folder = log_folder(config[Logging], run_dir)
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()
        self._writer = EventFileWriter(str(folder))
        for record in read_records(RunDirectory(run_dir).metrics):
            self._write(record.metrics, record.step, record.time)

    def log(self, metrics: Mapping[str, float], *, step: int, kind: str, rollout_id: int) -> None:
        """Write one event; ``step`` is its place on the axis."""
        del kind, rollout_id
        self._write(metrics, step, time.time())
        self._writer.flush()

    def close(self) -> None:
        """Flush and release."""
        self._writer.close()

    def _write(self, metrics: Mapping[str, float], step: int, wall_time: float) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(step=step, wall_time=wall_time, summary=Summary(value=values)))


def log_folder(flags: Logging, run_dir: Path) -> Path:
    """``--tensorboard-dir``/project/experiment; without the flag ``TENSORBOARD_DIR``, else a folder of the run."""
    given = flags.tensorboard_dir or environ.tensorboard_dir()
    root = Path(given) if given else run_dir / "tensorboard"
    return root.joinpath(*filter(None, (flags.tb_project_name, flags.tb_experiment_name)))
