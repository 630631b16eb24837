import pytest

from miles.core.report.curves import MAX_POINTS, Curves, charts, thin
from miles.core.report.results import evaluations
from miles.core.tracking.jsonl import Record, read_records


def record(kind, rollout_id, step=0, **metrics):
    return Record(kind, step, rollout_id, 0.0, {name.replace("__", "/"): value for name, value in metrics.items()})


def test_optimizer_steps_lie_between_their_rollout_and_the_next():
    curves = Curves.of(record("train", rollout, train__loss=1.0) for rollout in (0, 0, 1, 1))
    assert [place for place, _ in curves.points["train/loss"]] == [0.0, 0.5, 1.0, 1.5]


def test_values_that_are_not_finite_are_left_out():
    curves = Curves.of([record("train", 0, train__loss=float("nan")), record("train", 1, train__loss=2.0)])
    assert curves.points["train/loss"] == [(1.0, 2.0)]


def test_long_curves_are_averaged_over_neighbours():
    points = [(float(i), float(i % 2)) for i in range(10 * MAX_POINTS)]
    thinned = thin(points)
    assert len(thinned) == MAX_POINTS
    assert {y for _, y in thinned} == {0.5}


def test_a_metric_that_is_always_zero_has_no_chart():
    assert charts([record("train", 0, train__kl_loss=0.0, train__loss=0.5)], []) == [
        {
            "title": "Loss",
            "note": "What the optimizer minimizes.",
            "series": [{"name": "loss", "points": [(0.0, 0.5)], "dots": False}],
            "unit": "number",
            "stacked": False,
        }
    ]


def test_a_run_has_charts_of_reward_length_and_time(run):
    found = {chart["title"]: chart for chart in charts(list(read_records(run.metrics)), evaluations(run))}
    assert {"Reward", "Response length", "Loss", "Trainer against engine", "Time of a step"} <= set(found)
    assert [series["name"] for series in found["Reward"]["series"]] == ["reward in training", "sums passes"]
    times = found["Time of a step"]["series"]
    assert [series["name"] for series in times] == ["generate", "old log-probs", "train", "send weights", "other"]
    first = sum(series["points"][0][1] for series in times)
    (step_time,) = (
        r.metrics["perf/step_time"] for r in read_records(run.metrics) if r.kind == "rollout" and r.step == 0
    )
    assert first == pytest.approx(step_time)
