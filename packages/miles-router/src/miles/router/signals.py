"""A task's wait for something that the event loop's callbacks report, without a turn of the loop in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any

_Resume = Callable[["Signal"], object]


class Signal:
    """What one task at a time waits for: ``await signal`` returns at the next ``fire`` or ``fire_soon``.

    Nothing is remembered: a signal for which nobody waits is lost, so the one that waits looks first.  To a task this
    is a future (of the kind that ``asyncio.isfuture`` recognises); cancelling the task ends the wait as usual.
    """

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_context", "_loop", "_resume")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False
        self._resume: _Resume | None = None
        self._context: Context | None = None
        self._cancelled = False

    def fire(self) -> None:
        """Run the task on until it waits again; soon, if another task is running."""
        resume, context = self._resume, self._context
        if resume is None or context is None:
            return
        if asyncio.current_task(self._loop) is not None:  # tasks do not nest
            self.fire_soon()
            return
        self._resume = None
        context.run(resume, self)

    def fire_soon(self) -> None:
        """Let the task go on in the next turn of the loop."""
        if self._resume is not None:
            self._loop.call_soon(self._resume, self, context=self._context)
            self._resume = None

    # What a task asks of a future.

    def __await__(self) -> Generator[Signal, None, None]:
        self._cancelled = False
        self._asyncio_future_blocking = True
        yield self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, resume: _Resume, *, context: Context) -> None:
        self._resume = resume
        self._context = context

    def result(self) -> None:
        if self._cancelled:
            raise asyncio.CancelledError

    def cancel(self, msg: Any = None) -> bool:
        """End the wait; False when it has ended already."""
        if self._resume is None:
            return False
        self._cancelled = True
        self.fire_soon()
        return True
