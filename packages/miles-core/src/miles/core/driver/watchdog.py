"""Says of a rank that takes too long what it waits for: its call, and the stacks of its threads."""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from miles.core.types.batch import RolloutBatch

logger = logging.getLogger(__name__)


Method = TypeVar("Method", bound=Callable[..., Any])


def watched(method: Method) -> Method:
    """A method of an object with a ``_watchdog``, watched by it."""

    @wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        of = [f" of rollout {given.rollout_id}" for given in arguments if isinstance(given, RolloutBatch)]
        with self._watchdog.watching(f"{method.__name__}(){''.join(of)}"):
            return method(self, *arguments)

    return cast(Method, call)


class Watchdog:
    """Watches calls of one rank.  After ``deadline_s`` seconds, and again after each as many, it writes to ``log``.

    It interrupts nothing: a long call may be what the user wants.  A deadline of 0 watches nothing.
    """

    def __init__(self, who: str, log: Path, deadline_s: float) -> None:
        self._who, self._log, self._deadline_s = who, log, deadline_s

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Watch the block, which does ``what``."""
        if not self._deadline_s:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(what, done), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, what: str, done: threading.Event) -> None:
        start = time.monotonic()
        while not done.wait(self._deadline_s):
            told = f"{self._who} has been at {what} for {time.monotonic() - start:.0f} s"
            logger.warning("%s; the stacks of its threads are in %s", told, self._log)
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {told}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
