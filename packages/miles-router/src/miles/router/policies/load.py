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
        self._turn = (self._turn + 1) % len(workers)
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
    """The worker with the fewest requests in flight for its weight; among equals the one that got the fewest."""

    def __init__(self, settings: Settings) -> None:
        self._served: dict[str, float] = {}  # requests given to each worker, divided by its weight

    def choose(self, workers: Sequence[W], request: RoutableRequest) -> W:
        """See Policy."""
        if len(self._served) != len(workers) or any(worker.url not in self._served for worker in workers):
            self._admit([worker.url for worker in workers])
        served = self._served
        chosen = min(workers, key=lambda worker: (worker.in_flight / worker.weight, served[worker.url]))
        served[chosen.url] += 1 / chosen.weight
        return chosen

    def _admit(self, urls: list[str]) -> None:
        """Forget workers that left; a new one begins level with the one served least."""
        level = min((self._served[url] for url in urls if url in self._served), default=0.0)
        self._served = {url: self._served.get(url, level) for url in urls}


def least_loaded(workers: Sequence[W], turn: int) -> W:
    """The worker with the fewest requests in flight; ``workers[turn]`` among equals."""
    best = workers[turn]
    fewest = best.in_flight
    for worker in workers:
        if worker.in_flight < fewest:
            best, fewest = worker, worker.in_flight
    return best


def _in_flight(worker: W) -> int:
    return worker.in_flight
