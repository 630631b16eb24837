"""No full garbage collection while thousands of requests are in flight."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_NEVER = 1_000_000_000
_changing = threading.Lock()
_blocks = 0
_thresholds = gc.get_threshold()


@contextmanager
def full_collections_wait() -> Iterator[None]:
    """Put full collections off until the last such block ends; the younger generations are collected as always.

    Each walks through everything that waits for an answer, half a second of it for 10,000 requests, and finds nothing:
    what is in flight is in use.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _blocks, _thresholds  # as the collector's own thresholds are: of the process
    with _changing:
        if _blocks == 0:
            _thresholds = gc.get_threshold()
            gc.set_threshold(*_thresholds[:2], _NEVER)
        _blocks += 1


def _leave() -> None:
    global _blocks
    with _changing:
        _blocks -= 1
        if _blocks == 0:
            gc.set_threshold(*_thresholds)
