"""What there is to say about a run at this moment, whoever shows it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from miles.core.tracking import names
from miles.core.tracking.advice import PATIENCE, advice
from miles.core.tracking.jsonl import Record

BARS = "▁▂▃▄▅▆▇█"
RECENT = 10
"""Steps that the estimate of the remaining time looks at."""


@dataclass(slots=True)
class Scoreboard:
    """Latest values, short histories, and what the run waits for."""

    num_rollout: int | None = None
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    """Rollouts that were trained on."""
    latest: dict[str, float] = field(default_factory=dict)
    """Metrics of the last rollout and of its last optimizer step."""
    step: dict[str, float] = field(default_factory=dict)
    """Metrics of the last optimizer step."""
    history: dict[str, list[float]] = field(default_factory=dict)
    """Values of the metrics of rollouts and optimizer steps, in order."""
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    """Mean reward by data set, one per evaluation."""
    notes: list[str] = field(default_factory=list)
    """What looks wrong, each said once."""
    _suspicions: dict[str, int] = field(default_factory=dict)
    """Rollouts in a row that gave reason to an advice, by its topic; at most PATIENCE, and then it is said."""
    waiting_for: str | None = None
    waiting_since: float = 0.0

    def add(self, metrics: Mapping[str, float], *, kind: str, rollout_id: int) -> None:
        """Take in one event."""
        if kind == "train":
            self.step = dict(metrics)
        if kind == "eval":
            for name, score in names.eval_scores(metrics).items():
                self.evaluations.setdefault(name, []).append(score)
        if kind == "rollout":
            self.done = rollout_id + 1
            self.latest = {**self.step, **metrics}
            self._look()
        if kind != "eval":
            for name, value in metrics.items():
                self.history.setdefault(name, []).append(value)

    def _look(self) -> None:
        found = dict(advice(self.latest))
        said = {topic for topic, times in self._suspicions.items() if times == PATIENCE}
        counts = {topic: self._suspicions.get(topic, 0) + 1 for topic in found if topic not in said}
        self._suspicions = counts | dict.fromkeys(said, PATIENCE)
        self.notes += [f"after {self.done} rollouts: {found[topic]}" for topic in counts if counts[topic] == PATIENCE]

    def replay(self, record: Record) -> None:
        """Take in an event of an earlier life of the run."""
        self.add(record.metrics, kind=record.kind, rollout_id=record.rollout_id)

    def wait(self, for_what: str) -> None:
        """The run waits for this from now on.

        What precedes a colon names the wait and the rest is its progress, which does not start the clock again.
        """
        if self.waiting_for is None or _subject(for_what) != _subject(self.waiting_for):
            self.waiting_since = self.clock()
        self.waiting_for = for_what

    def waited_s(self) -> float:
        """Seconds since the present wait began."""
        return self.clock() - self.waiting_since if self.waiting_for else 0.0

    def remaining_s(self) -> float | None:
        """Estimate of the seconds to the end; None while nothing is known, and at the end."""
        steps = self.history.get(names.STEP_TIME)
        if not steps or self.num_rollout is None or self.done >= self.num_rollout:
            return None
        return (self.num_rollout - self.done) * statistics.median(steps[-RECENT:])


def _subject(wait: str) -> str:
    return wait.partition(":")[0]


def sparkline(values: list[float], width: int) -> str:
    """The last values as bars between their least and greatest."""
    shown = [value for value in values[-width:] if value == value]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """``0.52 s``, ``48 s``, ``3:07``, ``2:03:20``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
