"""Synchronous functions of the user's, called from the event loop without holding it up."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any


async def call(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """The result of a function, a coroutine function, or an object with an asynchronous ``__call__``.

    What is synchronous runs in a thread of its own that does not outlive the process: one that never returns costs
    a thread, not the pool that others wait for.
    """
    if not is_asynchronous(function):
        result = await in_own_thread(lambda: function(*args, **keywords))
    else:
        result = function(*args, **keywords)
    return await result if inspect.isawaitable(result) else result


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Whether a call returns at once and is to be awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def in_own_thread(work: Callable[[], Any]) -> Any:
    """The result of ``work``; a cancelled wait leaves the thread to itself."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop has ended, and nobody waits
            return

    threading.Thread(target=run, name="miles-hook", daemon=True).start()
    return await done
