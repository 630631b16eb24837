"""What reward types are built with: settings and worker pools.

Workers import this module with the graders: it stays light.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from miles.rewards.pool import OPEN_LIMITS, Pool


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything reward types want to know.  The defaults are those of the flags."""

    num_workers: int | None = None
    timeout_s: float | None = None
    """Deadline of one grading; None: the type's own."""
    concurrency: int = 64
    """Calls in flight at most, of users' coroutines and of remote services, each."""
    strict_upstream: bool = False
    url: str | None = None
    """Address of the reward service."""
    http_proxy: str | None = None
    num_senders: int = 0
    """Processes that send requests to the reward service; 0: the caller's own event loop does."""
    seed: int = 0
    max_response_len: int | None = None
    overlong_buffer_len: int = 4096
    reward_key: str | None = None
    args: Any = None
    """First argument of users' functions."""


class Context:
    """Settings, and the processes that grade.  Its owner calls ``close``."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._preload: set[str] = set()
        self._pool: Pool | None = None
        self._open_pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """Workers for graders, which only read text."""
        if self._pool is None:
            self._pool = Pool(self.settings.num_workers, preload=sorted(self._preload))
        return self._pool

    @property
    def open_pool(self) -> Pool:
        """Workers for functions of the user's own, which may need files and much memory."""
        if self._open_pool is None:
            self._open_pool = Pool(self.settings.num_workers, limits=OPEN_LIMITS)
        return self._open_pool

    def will_need(self, modules: Iterable[str]) -> None:
        """Import ``modules`` before the first worker is forked, if none is yet."""
        self._preload.update(modules)

    def start(self) -> None:
        """Fork the workers that are known to be needed."""
        if self._preload:
            self.pool.start()

    @property
    def num_replaced(self) -> int:
        """Workers killed or dead since the start."""
        return sum(pool.num_replaced for pool in (self._pool, self._open_pool) if pool)

    @property
    def problem(self) -> str:
        """Why workers cannot grade any more; empty while they can."""
        return next((pool.problem for pool in (self._pool, self._open_pool) if pool and pool.problem), "")

    def close(self) -> None:
        """End all workers."""
        for pool in (self._pool, self._open_pool):
            if pool is not None:
                pool.close()


@cache
def shared_context() -> Context:
    """The context of calls outside a run.  Its workers end with this process."""
    return Context()
