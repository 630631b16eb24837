"""A line per rollout, for log files and terminals without ``rich``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TextIO

from miles.core.tracking import names
from miles.core.tracking.scoreboard import Scoreboard, duration, number

HEARTBEAT_S = 30.0
"""After this long without a line, say what the run waits for."""


class PlainView:
    """Writes lines to a stream; a thread of its own keeps silence from looking like a hang."""

    def __init__(self, board: Scoreboard, stream: TextIO, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._board = board
        self._stream = stream
        self._heartbeat_s = heartbeat_s
        self._num_noted = len(board.notes)
        self._lock = threading.Lock()
        self._spoke = threading.Event()
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="console-heartbeat", daemon=True)

    def start(self) -> None:
        """Start the heartbeat."""
        self._heart.start()

    def show(self, kind: str) -> None:
        """Say what the board learned from an event of this kind; an optimizer step alone is not worth a line."""
        if kind == "rollout":
            self._write(rollout_line(self._board))
            for note in self._board.notes[self._num_noted :]:
                self._write(f"note: {note}")
            self._num_noted = len(self._board.notes)
        elif kind == "eval":
            self._write(eval_line(self._board))

    def stop(self) -> None:
        """End the heartbeat.  Safe to call twice."""
        self._stopped.set()
        self._spoke.set()
        if self._heart.is_alive():
            self._heart.join()

    def _write(self, line: str) -> None:
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()
        self._spoke.set()

    def _beat(self) -> None:
        while not self._stopped.is_set():
            spoke = self._spoke.wait(self._heartbeat_s)
            self._spoke.clear()
            if not spoke and self._board.waiting_for:
                self._write(f"waiting {duration(self._board.waited_s())} for {self._board.waiting_for}")


def rollout_line(board: Scoreboard) -> str:
    """``rollout 23/80  reward 0.62  length 23.1  loss 0.0123  12,310 tokens/s  step 0.95 s (generate 0.52, ...)``."""
    total = f"/{board.num_rollout}" if board.num_rollout is not None else ""
    return "  ".join([f"rollout {board.done}{total}", *_figures(board.latest)])


def eval_line(board: Scoreboard) -> str:
    """``eval  add3 0.0508 -> 0.43``: the first score and the last one."""
    scores = []
    for name, history in board.evaluations.items():
        first = f"{number(history[0])} -> " if len(history) > 1 else ""
        scores.append(f"{name} {first}{number(history[-1])}")
    return "  ".join(["eval", *scores])


def _figures(latest: dict[str, float]) -> Iterator[str]:
    for title, name in (("reward", names.REWARD), ("length", names.RESPONSE_LENGTH), ("loss", names.LOSS)):
        if name in latest:
            yield f"{title} {number(latest[name])}"
    if names.TOKENS_PER_S in latest:
        yield f"{number(latest[names.TOKENS_PER_S])} tokens/s"
    if names.STEP_TIME in latest:
        parts = ", ".join(f"{phase} {number(seconds)}" for phase, seconds in names.phases(latest).items())
        yield f"step {duration(latest[names.STEP_TIME])} ({parts})"
