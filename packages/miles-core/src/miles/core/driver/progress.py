"""Watching a call from beside it: how far it has come, for whoever waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL_S = 0.5
"""Often enough for a person, and nothing against what is watched."""


@contextmanager
def watched(
    ask: Callable[[], str | None], tell: Callable[[str], None], interval_s: float = INTERVAL_S
) -> Iterator[None]:
    """While the block runs, pass each new answer of ``ask`` to ``tell``, from a thread of its own.

    An ``ask`` that fails ends the watching, not the block: what it asks about fails by itself.
    """
    ended = threading.Event()

    def watch() -> None:
        told = None
        while not ended.wait(interval_s):
            try:
                answer = ask()
            except Exception:
                return
            if answer is not None and answer != told and not ended.is_set():
                tell(answer)
                told = answer

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
