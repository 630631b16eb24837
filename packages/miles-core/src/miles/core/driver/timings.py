"""Seconds of the phases of an iteration, told by the loop and by the threads beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Timings:
    """By phase, since the last ``take``."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._changing = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        """A phase that comes more than once is the sum."""
        with self._changing:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def replace(self, seconds: Mapping[str, float]) -> None:
        """Phases whose last time counts."""
        with self._changing:
            self._seconds |= seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block, unless it fails."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def take(self) -> dict[str, float]:
        """What there is, and begin anew."""
        with self._changing:
            found, self._seconds = self._seconds, {}
            return found
