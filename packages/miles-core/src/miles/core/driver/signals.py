"""Signals that end a run end it like an exception, so that owners stop what they started."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ending_signals_raise() -> Iterator[None]:
    """Turn the first SIGTERM or SIGHUP of the block into ``SystemExit(128 + number)``; later ones are ignored.

    A signal that whoever started us wants ignored (``nohup``) stays ignored.
    """
    received: list[int] = []

    def leave(number: int, frame: object) -> None:
        if received:
            return  # the run is being ended already, and every step of that has a deadline
        received.append(number)
        sys.exit(128 + number)

    previous = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            sys.stderr.write(f"ended by {signal.Signals(received[0]).name}\n")
