"""How late an event loop is, beyond what the machine does to every thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable

LIMIT_S = 0.1
"""No hook may hold up the loop for longer."""
ATTEMPTS = 5
"""A busy machine makes a loop late, never early: one good round is proof."""
_TICK_S = 0.01


async def lateness(work: Awaitable[object]) -> float:
    """The longest that the loop was late while ``work`` was done, in seconds; a thread beside it shows the noise."""
    done = threading.Event()
    noise = [0.0]
    thread = threading.Thread(target=_watch, args=(done, noise), daemon=True)
    thread.start()
    task = asyncio.ensure_future(work)
    latest = 0.0
    while not task.done():
        before = time.perf_counter()
        await asyncio.sleep(_TICK_S)
        latest = max(latest, time.perf_counter() - before - _TICK_S)
    done.set()
    thread.join()
    await task
    return latest - noise[0]


def _watch(done: threading.Event, noise: list[float]) -> None:
    while not done.is_set():
        before = time.perf_counter()
        time.sleep(_TICK_S)
        noise[0] = max(noise[0], time.perf_counter() - before - _TICK_S)
