"""Checkpoints of a run, one at a time: written while training waits, or beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from miles.core.driver import checkpoint
from miles.core.driver.background import Background
from miles.core.driver.checkpoint import Checkpoint, DriverState


class Saver:
    """``keep`` as in ``checkpoint.publish``.

    ``finish`` returns when everything that was begun to be written is on disk, and raises what went wrong.
    """

    def __init__(self, directory: Path, finish: Callable[[], None], *, keep: int | None, in_background: bool) -> None:
        self._directory = directory
        self._finish = finish
        self._keep = keep
        self._in_background = in_background
        self._writing: Background[None] | None = None

    def save(self, state: DriverState, fill: Callable[[Checkpoint], None]) -> None:
        """Publish what ``fill`` writes, or has begun to write; the one before is complete first."""
        self.wait()
        partial = checkpoint.begin(self._directory, state)
        try:
            fill(partial)
        except BaseException:
            checkpoint.remove_partial(self._directory)
            raise
        if self._in_background:
            self._writing = Background(lambda: self._publish(partial), name=f"checkpoint-{state.rollout_id}")
        else:
            self._publish(partial)

    def check(self) -> None:
        """Raise what went wrong since; do not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raise what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _publish(self, partial: Checkpoint) -> None:
        try:
            self._finish()
            checkpoint.complete(partial, keep=self._keep)
        except BaseException:
            checkpoint.remove_partial(self._directory)  # a full disk needs the room
            raise
