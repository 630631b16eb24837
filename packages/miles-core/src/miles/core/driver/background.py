"""Calls that run beside the loop, in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """A call that has begun.  Its thread does not keep a process alive that ends for another reason."""

    def __init__(self, call: Callable[[], Result], name: str) -> None:
        self._future: Future[Result] = Future()
        threading.Thread(target=self._run, args=(call,), name=name, daemon=True).start()

    def done(self) -> bool:
        """Whether ``result`` returns at once."""
        return self._future.done()

    def result(self) -> Result:
        """What the call returned, when it has ended; raises what it raised."""
        return self._future.result()

    def _run(self, call: Callable[[], Result]) -> None:
        try:
            self._future.set_result(call())
        except BaseException as error:
            self._future.set_exception(error)
