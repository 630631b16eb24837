"""Fair turns on an event loop: what becomes ready by the thousand does not hold the loop for seconds."""

from __future__ import annotations

import asyncio
from collections import deque

PER_TURN = 128
"""About ten milliseconds of work on answers."""


class Turns:
    """Lets a bounded number of coroutines go on in one turn of the event loop.  Belongs to one loop."""

    def __init__(self, per_turn: int = PER_TURN) -> None:
        self._per_turn = per_turn
        self._left: int | None = None
        """In this turn; None: nobody has come yet."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Return at once while there is room in this turn, in a later turn otherwise; first come, first served."""
        if self._left is None:
            self._left = self._per_turn
            asyncio.get_running_loop().call_soon(self._next)
        if self._left > 0:
            self._left -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        await place

    def _next(self) -> None:
        """A new turn begins."""
        self._left = self._per_turn
        while self._waiting and self._left:
            place = self._waiting.popleft()
            if not place.done():  # it may have been cancelled
                place.set_result(None)
                self._left -= 1
        if self._waiting or self._left < self._per_turn:
            asyncio.get_running_loop().call_soon(self._next)
        else:
            self._left = None
