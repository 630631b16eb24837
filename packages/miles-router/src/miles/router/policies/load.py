"""Policies that look at load only."""

from __future__ import annotations

import random
from collections.abc import Sequence

from miles.router.policies import RoutableRequest, W
from miles.router.settings import Settings


class LeastLoaded:
    """The worker with the fewest requests in flight; equals take turns."""

    def __init__(self, settings: Settings) -> None:
        self._turn = 0

    def choose(self, workers: Sequence[W], request: RoutableRequest) -> W:
        """See Policy."""
        self._turn += 1
        return least_loaded(workers, self._turn)


class RoundRobin:
    """Each worker in turn."""

    def __init__(self, settings: Settings) -> None:
        self._turn = -1

    def choose(self, workers: Sequence[W], request: RoutableRequest) -> W:
        """See Policy."""
        self._turn += 1
        return workers[self._turn % len(workers)]


class PowerOfTwo:
    """The less loaded of two workers drawn at random."""

    def __init__(self, settings: Settings) -> None:
        self._random = random.Random()

    def choose(self, workers: Sequence[W], request: RoutableRequest) -> W:
        """See Policy."""
        if len(workers) == 1:
            return workers[0]
        first, second = self._random.sample(range(len(workers)), 2)
        return min(workers[first], workers[second], key=_in_flight)


class Weighted:
    """The worker with the fewest requests in flight for its weight."""

    def __init__(self, settings: Settings) -> None:
        pass

    def choose(self, workers: Sequence[W], request: RoutableRequest) -> W:
        """See Policy."""
        return min(workers, key=lambda worker: (worker.in_flight + 1) / worker.weight)


def least_loaded(workers: Sequence[W], turn: int) -> W:
    """The worker with the fewest requests in flight, the search beginning at worker ``turn``."""
    count = len(workers)
    best = workers[turn % count]
    for offset in range(1, count):
        worker = workers[(turn + offset) % count]
        if worker.in_flight < best.in_flight:
            best = worker
    return best


def _in_flight(worker: W) -> int:
    return worker.in_flight
