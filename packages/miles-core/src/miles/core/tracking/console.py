"""What the person at the terminal sees."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from miles.core.run_directory import RunDirectory
from miles.core.tracking.jsonl import read_records
from miles.core.tracking.plain import PlainView
from miles.core.tracking.scoreboard import Scoreboard

if TYPE_CHECKING:
    from miles.core.config import Config


class View(Protocol):
    """A way to show the scoreboard."""

    def start(self) -> None: ...

    def show(self, kind: str) -> None: ...

    def stop(self) -> None: ...


class ConsoleTracker:
    """A live view where there is a terminal and ``rich``, plain lines otherwise."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._board = Scoreboard(num_rollout=config.num_rollout)
        for record in read_records(RunDirectory(run_dir).metrics):
            self._board.replay(record)
        self._view = choose_view(self._board, sys.stdout, str(run_dir))
        self._view.start()

    def log(self, metrics: Mapping[str, float], *, step: int, kind: str, rollout_id: int) -> None:
        """Show an event."""
        del step
        self._board.add(metrics, kind=kind, rollout_id=rollout_id)
        self._view.show(kind)

    def waiting(self, for_what: str) -> None:
        """Show what the run waits for."""
        self._board.wait(for_what)

    def close(self) -> None:
        """Give the terminal back.  Safe to call twice."""
        self._board.waiting_for = None
        self._view.stop()


def choose_view(board: Scoreboard, stream: TextIO, title: str) -> View:
    """The live view if ``stream`` is a terminal that can show it."""
    if stream.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        from miles.core.tracking.live import LiveView

        console = Console(file=stream)
        if not console.is_dumb_terminal:
            return LiveView(board, console, title)
    return PlainView(board, stream)
