"""Requests of one session go to one worker."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence

from miles.router.policies import RoutableRequest, W
from miles.router.policies.load import LeastLoaded
from miles.router.settings import Settings

_POINTS_PER_WORKER = 128
_KEPT_RINGS = 64


class Sticky:
    """Consistent hashing with bounded load (arXiv:1608.01350).

    The session's worker is the first on the ring after the session's hash that has at most ``load_factor`` times the
    average number of requests in flight.  When a worker leaves, only its sessions move.  Requests without a session go
    to the least loaded worker.
    """

    def __init__(self, settings: Settings) -> None:
        self._header = settings.session_header.lower().encode("ascii")
        self._load_factor = settings.load_factor
        self._without_session = LeastLoaded(settings)
        self._rings: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}

    def choose(self, workers: Sequence[W], request: RoutableRequest) -> W:
        """See Policy."""
        session = request.header(self._header)
        if session is None:
            return self._without_session.choose(workers, request)
        points, owners = self._ring(tuple(worker.url for worker in workers))
        in_flight = sum(worker.in_flight for worker in workers)
        limit = math.ceil(self._load_factor * (in_flight + 1) / len(workers))
        at = bisect_right(points, _hash(session))
        walk = (workers[owners[(at + offset) % len(owners)]] for offset in range(len(owners)))
        return next(worker for worker in walk if worker.in_flight < limit)  # the least loaded one is below it

    def _ring(self, urls: tuple[str, ...]) -> tuple[list[int], list[int]]:
        ring = self._rings.get(urls)
        if ring is None:
            marks = [
                (_hash(f"{url}#{point}".encode()), owner)
                for owner, url in enumerate(urls)
                for point in range(_POINTS_PER_WORKER)
            ]
            marks.sort()
            ring = ([mark for mark, _ in marks], [owner for _, owner in marks])
            if len(self._rings) >= _KEPT_RINGS:
                self._rings.clear()
            self._rings[urls] = ring
        return ring


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
