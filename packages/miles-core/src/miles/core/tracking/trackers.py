"""All trackers of a run, used as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from miles.core.flags.logging import Logging
from miles.core.protocols.tracker import StatusTracker, Tracker
from miles.core.registry import Registry
from miles.core.tracking.jsonl import JsonlTracker

if TYPE_CHECKING:
    from miles.core.config import Config

TRACKERS: Registry = Registry("miles.trackers")


class Trackers:
    """``metrics.jsonl``, the console, and whatever else was asked for."""

    def __init__(self, journal: JsonlTracker, others: Sequence[Tracker] = ()) -> None:
        self._journal = journal
        self._all: list[Tracker] = [journal, *others]
        self._status = [tracker for tracker in others if isinstance(tracker, StatusTracker)]

    @classmethod
    def open(cls, config: Config, run_dir: Path, *, metrics_offset: int = 0) -> Trackers:
        """Start every tracker of the configuration.

        ``metrics_offset`` is where the checkpoint that the run continues from ends (0: the run starts from nothing).
        What lies behind it in ``metrics.jsonl`` belongs to work that is done again, and is cut off first: the other
        trackers read the history of the run from that file when they start.
        """
        journal = JsonlTracker(config, run_dir)
        journal.truncate(metrics_offset)
        with ExitStack() as opened:
            opened.callback(journal.close)
            others: list[Tracker] = []
            for name in tracker_names(config[Logging]):
                others.append(TRACKERS.get(name)(config, run_dir))
                opened.callback(others[-1].close)
            opened.pop_all()
        return cls(journal, others)

    def log(self, metrics: Mapping[str, float], *, step: int, kind: str, rollout_id: int) -> None:
        """Record one event: ``kind`` is ``rollout``, ``train`` or ``eval``; ``step`` counts in that kind's own unit."""
        for tracker in self._all:
            tracker.log(metrics, step=step, kind=kind, rollout_id=rollout_id)

    def waiting(self, for_what: str) -> None:
        """Say what the run waits for from now on, for example ``rollout 12: 180/256 samples``."""
        for tracker in self._status:
            tracker.waiting(for_what)

    def offset(self) -> int:
        """Bytes of ``metrics.jsonl`` so far, all of them on disk; a checkpoint keeps it as ``metrics_offset``."""
        return self._journal.offset()

    def close(self) -> None:
        """Flush and release, in reverse order of starting; an error in one does not spare the others."""
        with ExitStack() as closing:
            for tracker in self._all:
                closing.callback(tracker.close)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def tracker_names(logging: Logging) -> list[str]:
    """Trackers beside ``metrics.jsonl``: the console always, the others when asked for."""
    names = ["console"]
    if logging.use_tensorboard:
        names.append("tensorboard")
    if logging.use_wandb:
        names.append("wandb")
    return [*names, *logging.tracker]
