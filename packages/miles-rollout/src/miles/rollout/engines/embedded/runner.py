"""The model thread: it alone touches the scheduler and the model."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from miles.core.errors import EngineError
from miles.rollout.engines.embedded.scheduler import Scheduler

Result = TypeVar("Result")


class Runner:
    """Steps a scheduler in a thread of its own, and runs commands between two steps.

    ``on_failure`` is called on the model thread when a step raises; nothing runs after that.
    """

    def __init__(self, scheduler: Scheduler, on_failure: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._on_failure = on_failure
        self._commands: deque[tuple[Callable[[], object], Future[object] | None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def stop(self, deadline_s: float = 5.0) -> None:
        """Return when the thread has ended, after its current step."""
        self._stopping = True
        self._wake.set()
        self._thread.join(deadline_s)

    def post(self, command: Callable[[], object]) -> None:
        """Run ``command`` on the model thread before the next step."""
        self._commands.append((command, None))
        self._wake.set()

    def call(self, command: Callable[[Scheduler], Result]) -> Future[Result]:
        """Like ``post``, with the result."""
        future: Future[Result] = Future()
        self._commands.append((lambda: command(self._scheduler), future))  # type: ignore[arg-type]
        self._wake.set()
        if self.failure is not None:  # looked at last: whoever fails meanwhile refuses what is there
            self._refuse_commands(self.failure)
        return future

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._run_commands()
                if self._scheduler.idle:
                    self._wake.wait()
                    self._wake.clear()
                else:
                    self._scheduler.step()
        except BaseException as error:
            self.failure = error
            traceback.print_exc()
            self._refuse_commands(error)
            self._on_failure()

    def _run_commands(self) -> None:
        while self._commands:
            command, future = self._commands.popleft()
            if future is None:
                command()
                continue
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(command())
            except EngineError as error:
                future.set_exception(error)
            except BaseException as error:  # ends the engine; who asked learns why before that
                future.set_exception(EngineError(f"the engine failed: {error!r}"))
                raise

    def _refuse_commands(self, error: BaseException) -> None:
        while True:
            try:
                _, future = self._commands.popleft()
            except IndexError:  # this thread's or another's were the last
                return
            if future is not None:
                future.set_exception(EngineError(f"the engine failed: {error!r}"))
