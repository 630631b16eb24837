"""The curves of a run, from ``metrics.jsonl``.

The horizontal axis of every curve counts the rollouts that the policy had been trained on when the value was measured.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from miles.core.report.results import Evaluation
from miles.core.tracking import names
from miles.core.tracking.jsonl import Record

MAX_POINTS = 600
"""A curve with more is averaged over neighbours: a screen has no more columns to show."""

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    points: Points
    dots: bool = False
    """Mark every point: there are few, and they matter."""


@dataclass(frozen=True, slots=True)
class Chart:
    """What a chart shows, and how."""

    title: str
    note: str
    series: list[Series]
    unit: Literal["share", "number", "seconds"] = "number"
    stacked: bool = False
    """Areas on top of each other instead of lines."""


@dataclass(slots=True)
class Curves:
    """Values of every metric by name, with their place on the axis."""

    points: dict[str, Points] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, records: Iterable[Record]) -> Curves:
        """Place optimizer steps of one rollout evenly between it and the next."""
        curves = cls()
        events = list(records)
        steps = Counter(event.rollout_id for event in events if event.kind == "train")
        seen: Counter[int] = Counter()
        for event in events:
            place = float(event.rollout_id)
            if event.kind == "train":
                place += seen[event.rollout_id] / steps[event.rollout_id]
                seen[event.rollout_id] += 1
            for name, value in event.metrics.items():
                if math.isfinite(value):
                    curves.points[name].append((place, value))
        return curves

    def series(self, title: str, name: str) -> list[Series]:
        """The curve of one metric, if it was logged and ever differs from zero."""
        points = self.points.get(name, [])
        return [Series(title, thin(points))] if any(value for _, value in points) else []


def charts(records: Iterable[Record], evaluated: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Every chart that has something to show, in reading order, as plain data."""
    curves = Curves.of(records)
    loss = Chart("Loss", "What the optimizer minimizes.", curves.series("loss", names.LOSS))
    reward = _reward(curves, evaluated)
    wanted = [
        *([reward, _length(curves, evaluated), loss] if reward.series else [loss, _length(curves, evaluated)]),
        Chart(
            "Policy drift",
            "Divergence of the policy from the one that sampled, and from the reference.",
            curves.series("from the sampling policy", "train/ppo_kl")
            + curves.series("from the reference", "train/kl_loss"),
        ),
        Chart(
            "Trainer against engine",
            "Mean difference of the log-probability that the two give to the same token. Near zero: they agree.",
            curves.series("difference", "train/train_rollout_logprob_abs_diff"),
        ),
        Chart(
            "Entropy", "How undecided the policy is, in nats per token.", curves.series("entropy", "train/entropy_loss")
        ),
        Chart("Gradient norm", "Before clipping.", curves.series("norm", names.GRAD_NORM)),
        _shares(curves),
        _times(records),
        Chart("Throughput", "Response tokens per second of generation.", curves.series("tokens/s", names.TOKENS_PER_S)),
    ]
    return [asdict(chart) for chart in wanted if chart.series]


def thin(points: Points) -> Points:
    """At most ``MAX_POINTS`` points, each the mean of as many neighbours."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _reward(curves: Curves, evaluated: Sequence[Evaluation]) -> Chart:
    series = curves.series("reward in training", names.REWARD)
    series += _by_dataset(evaluated, "{} passes", lambda evaluation: evaluation.pass_rate)
    note = "Mean reward of the sampled responses, and the share of held-out prompts that are answered right."
    values = [value for one in series for _, value in one.points]
    share = bool(values) and min(values) >= 0 and max(values) <= 1
    return Chart("Reward", note, series, unit="share" if share else "number")


def _length(curves: Curves, evaluated: Sequence[Evaluation]) -> Chart:
    series = curves.series("in training", names.RESPONSE_LENGTH)
    series += _by_dataset(evaluated, "{}", lambda evaluation: evaluation.mean_length)
    return Chart("Response length", "Mean number of tokens, thinking included.", series)


def _by_dataset(evaluated: Sequence[Evaluation], title: str, value: Any) -> list[Series]:
    points: dict[str, Points] = defaultdict(list)
    for evaluation in evaluated:
        points[evaluation.dataset].append((float(evaluation.rollout_id), value(evaluation)))
    return [Series(title.format(name), curve, dots=True) for name, curve in points.items()]


def _shares(curves: Curves) -> Chart:
    series = curves.series("clipped tokens", "train/pg_clipfrac") + curves.series(
        "truncated responses", names.TRUNCATED
    )
    return Chart("Clipped and truncated", "Shares of tokens and of responses.", series, unit="share")


def _times(records: Iterable[Record]) -> Chart:
    points: dict[str, Points] = {}
    rollouts = [event for event in records if event.kind == "rollout"]
    seconds = [names.phases(event.metrics) for event in rollouts]
    for title in (*names.PHASES.values(), "other"):
        if any(phase.get(title) for phase in seconds):
            points[title] = [(float(e.rollout_id), s.get(title, 0.0)) for e, s in zip(rollouts, seconds, strict=True)]
    series = [Series(title, thin(curve)) for title, curve in points.items()]
    return Chart("Time of a step", "Where the seconds of one rollout go.", series, unit="seconds", stacked=True)
