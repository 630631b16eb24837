"""Watching an engine, and replacing it when it has ended or hangs (``--use-fault-tolerance``)."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from miles.core.errors import EngineError
from miles.core.protocols.engine import EngineProcess
from miles.rollout import control

logger = logging.getLogger(__name__)

Launch = Callable[[], EngineProcess]
RESTART_WINDOW_S = 600.0
"""Restarts within this time count together: what fails that often will fail again."""
START_DEADLINE_S = 1800.0
"""Large models load for a long time; an engine that dies meanwhile is noticed at once."""
_POLL_S = 0.2
_FIRST_BACKOFF_S = 1.0
_END_DEADLINE_S = 5.0


class EngineState(Enum):
    """Where an engine's place in the fleet stands."""

    SERVING = "serving"
    STARTING = "starting"
    """The engine is lost, and its successor not ready."""
    WAITING = "waiting"
    """The successor is ready, and waits for the trainer's weights."""
    LOST = "lost"
    """Given up; ``EngineKeeper.failure`` says why."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How closely an engine is watched, and how often it may be replaced."""

    interval_s: float = 30.0
    """Between two heartbeats."""
    timeout_s: float = 30.0
    """For the answer to a heartbeat."""
    first_wait_s: float = 0.0
    """Before the first heartbeat of an engine that serves."""
    max_restarts: int = 3
    """Within ``RESTART_WINDOW_S``."""


class EngineKeeper:
    """Keeps one place of the fleet filled, in a thread of its own.

    ``find_room`` returns what launches a successor; to find a place for it may take minutes where a node was lost.
    ``on_lost`` is told the address of an engine that serves no more, ``on_ready`` is called when its successor answers.
    All are called on the keeper's thread.
    """

    def __init__(
        self,
        engine: EngineProcess,
        *,
        find_room: Callable[[], Launch],
        patience: Patience,
        on_lost: Callable[[str], None],
        on_ready: Callable[[EngineKeeper], None],
    ) -> None:
        self.engine = engine
        self.state = EngineState.SERVING
        self.failure: EngineError | None = None
        self.num_restarts = 0
        """Engines started in place of another one, over the run."""
        self._find_room, self._patience = find_room, patience
        self._on_lost, self._on_ready = on_lost, on_ready
        self._resting = self._num_rests = 0
        self._starting = False
        self._aside = threading.Event()
        self._complaint: str | None = None
        self._restarts: deque[float] = deque()
        self._ending = threading.Event()
        self._changing = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name=f"keeper of {engine.url}", daemon=True)

    def watch(self) -> None:
        """Begin."""
        self._thread.start()

    def rest(self) -> None:
        """Hear no heartbeats until ``wake``: while its weights change or its memory is released it may be silent."""
        with self._changing:
            self._resting += 1
            self._num_rests += 1

    def wake(self) -> None:
        """Undo one ``rest``."""
        with self._changing:
            self._resting = max(0, self._resting - 1)

    def step_aside(self) -> None:
        """While it rests: end a successor that is not ready, whose memory somebody else is to have.

        Another one starts after the rest, and this one does not count as a restart.
        """
        with self._changing:
            if not self._starting:
                return
            self._aside.set()
            engine = self.engine
        engine.stop(_END_DEADLINE_S)

    def serve(self) -> None:
        """The engine holds the trainer's weights."""
        with self._changing:
            if self.state is EngineState.WAITING:
                self.state = EngineState.SERVING

    def replace(self, reason: str) -> None:
        """Treat the engine as lost, because of something that only its user can see."""
        self._complaint = reason

    def stop(self) -> None:
        """End the engine and the watching.  Safe to call twice."""
        self._ending.set()
        with self._changing:
            engine = self.engine
        engine.stop()
        if self._thread.is_alive():
            self._thread.join(_END_DEADLINE_S)

    def _keep(self) -> None:
        try:
            while (reason := self._reason_to_replace()) is not None:
                if not self._replace(reason):
                    return
        except Exception as error:  # nobody else would hear of it, and the run would wait for this engine for ever
            if self._ending.is_set():  # what it called may have ended before it
                return
            logger.exception("the watching of an engine broke")
            self.failure = EngineError(
                f"the engine at {self.engine.url} is watched no more: {type(error).__name__}: {error}"
            )
            self.state = EngineState.LOST

    def _reason_to_replace(self) -> str | None:
        """Wait until the engine is lost, and say how; None when the watching ends first."""
        beat_at = time.monotonic() + self._patience.first_wait_s
        while not self._ending.wait(_POLL_S):
            if not self.engine.alive():
                return self.engine.describe_end()
            if self._complaint is not None:
                return self._complaint
            if not self._resting and time.monotonic() >= beat_at:
                rests = self._num_rests
                problem = control.heartbeat(self.engine.url, self._patience.timeout_s)
                if problem is not None and rests == self._num_rests and self.engine.alive():
                    return f"the engine at {self.engine.url} hangs: {problem}"
                beat_at = time.monotonic() + self._patience.interval_s
        return None

    def _replace(self, reason: str) -> bool:
        """End what is left of the engine and start others until one is ready; False when that is given up."""
        logger.warning("an engine is replaced: %s", reason)
        self.state = EngineState.STARTING
        self._on_lost(self.engine.url)
        while not self._ending.is_set():
            self.engine.stop(_END_DEADLINE_S)
            if not self._may_restart():
                self._give_up(reason)
                return False
            self._ending.wait(self._backoff_s())
            problem = self._start_in_turn()
            if problem is None:
                self._on_ready(self)
                return True
            reason = problem
        return False

    def _start_in_turn(self) -> str | None:
        """Have an engine ready while nobody rests; why it did not get there, or None."""
        while self._is_its_turn():
            self._aside.clear()
            problem = self._launch() or self._become_ready()
            if not self._aside.is_set():
                return problem
            self.engine.stop(_END_DEADLINE_S)
        return "the run ends"

    def _is_its_turn(self) -> bool:
        """Wait while engines rest: the memory that a successor needs may be the trainer's.  False when the run ends."""
        while self._resting and not self._ending.wait(_POLL_S):
            pass
        return not self._ending.is_set()

    def _launch(self) -> str | None:
        """Start an engine; why there is none, or None."""
        try:
            launch = self._find_room()  # whoever rests, wakes or stops meanwhile does not wait for it
        except (EngineError, OSError) as error:
            self._restarts.append(time.monotonic())
            return str(error)
        with self._changing:
            if self._ending.is_set():
                return "the run ends"
            if self._resting:
                self._aside.set()
                return "others have its memory"
            self._restarts.append(time.monotonic())
            try:
                self.engine = launch()
            except (EngineError, OSError) as error:
                return str(error)
            self._starting = True
            self.num_restarts += 1
        return None

    def _become_ready(self) -> str | None:
        """Wait until the engine that was launched answers; why it does not, or None."""
        problem = self._problem_of_starting()
        with self._changing:
            self._starting = False
            if self._aside.is_set():
                self._restarts.pop()
                self.num_restarts -= 1
            elif problem is None:
                self._complaint = None
                self.state = EngineState.WAITING
        return problem

    def _problem_of_starting(self) -> str | None:
        try:
            self.engine.wait_ready(START_DEADLINE_S)
        except EngineError as error:
            return str(error)
        return None

    def _may_restart(self) -> bool:
        while self._restarts and time.monotonic() - self._restarts[0] > RESTART_WINDOW_S:
            self._restarts.popleft()
        return len(self._restarts) < self._patience.max_restarts

    def _backoff_s(self) -> float:
        """None before the first restart, then doubling: what the machine lacks now it may have soon."""
        return _FIRST_BACKOFF_S * 2 ** (len(self._restarts) - 1) if self._restarts else 0.0

    def _give_up(self, reason: str) -> None:
        window = f"{RESTART_WINDOW_S / 60:.0f} minutes"
        self.failure = EngineError(
            f"an engine was replaced {len(self._restarts)} times within {window}, and is lost again: {reason}\n"
            f"More than --rollout-engine-max-restarts {self._patience.max_restarts} in {window} ends the run"
        )
        self.state = EngineState.LOST
