"""From the model thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from miles.rollout.engines.embedded.sequence import Progress

Receiver = Callable[[Progress], None]


class Outbox:
    """Carries progress over; everything that a step produces wakes the loop once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[Receiver, Progress]] = deque()
        self._scheduled = False

    def put(self, receiver: Receiver, progress: Progress) -> None:
        """Call ``receiver(progress)`` on the loop.  For the model thread."""
        self._items.append((receiver, progress))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False  # first: what is put from here on wakes the loop again
        while self._items:
            receiver, progress = self._items.popleft()
            receiver(progress)
