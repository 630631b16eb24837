"""The live view on a terminal.  Needs ``rich`` (``miles-core[console]``)."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from miles.core.tracking import names
from miles.core.tracking.plain import eval_line
from miles.core.tracking.scoreboard import Scoreboard, duration, number, sparkline

REFRESH_HZ = 4
SPARK_WIDTH = 40
CURVES = (("reward", names.REWARD), ("length", names.RESPONSE_LENGTH), ("loss", names.LOSS))


class LiveView:
    """A panel that is drawn again a few times a second, above it whatever the run prints."""

    def __init__(self, board: Scoreboard, console: Console, title: str) -> None:
        self._board = board
        self._title = title
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=REFRESH_HZ)

    def start(self) -> None:
        """Take the bottom of the terminal."""
        self._live.start(refresh=True)

    def show(self, kind: str) -> None:
        """Nothing to do: the panel shows the board as it is.  An evaluation stays on the terminal as a line."""
        if kind == "eval":
            self._live.console.print(eval_line(self._board), highlight=False)

    def stop(self) -> None:
        """Leave the last state on the terminal.  Safe to call twice."""
        self._live.stop()

    def render(self) -> RenderableType:
        """The panel."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(justify="right", style="bold")
        table.add_column()
        for row in self._rows():
            table.add_row(*row)
        notes = [Text(note, style="yellow") for note in self._board.notes]
        return Panel(
            Group(self._progress(), Text(), table, *notes), title=self._title, title_align="left", border_style="dim"
        )

    def _progress(self) -> RenderableType:
        board = self._board
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column()
        line.add_column(ratio=1)
        line.add_column(justify="right")
        if board.num_rollout is None:
            line.add_row(f"rollout {board.done}", "", "")
            return line
        remaining = board.remaining_s()
        left = f"{duration(remaining)} left" if remaining is not None else ""
        bar = ProgressBar(total=max(board.num_rollout, 1), completed=board.done)
        line.add_row(f"rollout {board.done}/{board.num_rollout}", bar, left)
        return line

    def _rows(self) -> Iterator[tuple[RenderableType, ...]]:
        latest, history = self._board.latest, self._board.history
        for title, name in CURVES:
            if name in latest:
                yield title, number(latest[name]), Text(sparkline(history.get(name, []), SPARK_WIDTH), style="cyan")
        if names.TOKENS_PER_S in latest:
            yield "speed", number(latest[names.TOKENS_PER_S]), "tokens/s"
        if names.STEP_TIME in latest:
            parts = " · ".join(f"{phase} {number(seconds)}" for phase, seconds in names.phases(latest).items())
            yield "step", duration(latest[names.STEP_TIME]), Text(parts, style="dim")
        for name, scores in list(self._board.evaluations.items()):  # the run may add one meanwhile
            yield "eval", number(scores[-1]), Text(f"{name}, {number(scores[0])} at first", style="dim")
        if self._board.waiting_for:
            yield "waiting", duration(self._board.waited_s()), Text(self._board.waiting_for, style="yellow")
