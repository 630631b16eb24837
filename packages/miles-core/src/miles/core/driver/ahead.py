"""The rollout that is generated while another one is trained on, and its place in a checkpoint.

A checkpoint keeps it whole: it was made with weights older than the checkpoint's, so it could not be made again.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

from miles.core.driver.background import Background
from miles.core.errors import CheckpointError
from miles.core.protocols.rollout import RolloutResult

FILE = "rollout_ahead.pickle"


class Ahead:
    """At most one rollout that was begun, or taken from a checkpoint, before its turn."""

    def __init__(self) -> None:
        self._rollout_id: int | None = None
        self._generation: Background[RolloutResult] | None = None

    def begin(self, rollout_id: int, generate: Callable[[int], RolloutResult]) -> None:
        """Start generating it and return at once."""
        assert self._rollout_id is None, "one rollout ahead"
        self._rollout_id = rollout_id
        self._generation = Background(lambda: generate(rollout_id), name=f"rollout-{rollout_id}")

    def holds(self, rollout_id: int) -> bool:
        """Whether ``take`` gives this rollout."""
        return self._rollout_id == rollout_id

    def running(self) -> bool:
        """Whether it is still being generated."""
        return self._generation is not None and not self._generation.done()

    def wait(self) -> None:
        """Return when nothing is being generated; raise what generation raised."""
        if self._generation is not None:
            self._generation.result()

    def take(self) -> RolloutResult:
        """The rollout, when it is complete."""
        assert self._generation is not None, "nothing was begun"
        result = self._generation.result()
        self._rollout_id = self._generation = None
        return result

    def save(self, directory: Path) -> None:
        """Write what was begun, when it is complete."""
        if self._generation is not None:
            kept = (self._rollout_id, self._generation.result())
            (directory / FILE).write_bytes(pickle.dumps(kept))

    def load(self, directory: Path) -> None:
        """Take back what ``save`` wrote, if it wrote anything."""
        path = directory / FILE
        if not path.is_file():
            return
        try:
            rollout_id, result = pickle.loads(path.read_bytes())  # noqa: S301  (its checksum held)
        except Exception as error:  # a pickle may raise anything: of another version of a class, for example
            raise CheckpointError(
                f"{path}: the rollout that was generated ahead cannot be read ({type(error).__name__}: {error})"
            ) from error
        self.begin(rollout_id, lambda _: result)
