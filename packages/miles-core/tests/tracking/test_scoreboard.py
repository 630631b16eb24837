import math

import pytest

from miles.core.tracking import names
from miles.core.tracking.scoreboard import Scoreboard, duration, number, sparkline


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_progress_does_not_start_the_clock_of_a_wait_again():
    clock = Clock()
    board = Scoreboard(clock=clock)
    board.wait("rollout 12: 3/256 samples")
    clock.now += 5
    board.wait("rollout 12: 180/256 samples")
    assert board.waiting_for == "rollout 12: 180/256 samples"
    assert board.waited_s() == 5
    board.wait("training on rollout 12")
    assert board.waited_s() == 0


def test_remaining_time_is_the_median_step_times_what_is_left():
    board = Scoreboard(num_rollout=10)
    assert board.remaining_s() is None
    for rollout_id, seconds in enumerate((9.0, 2.0, 2.0)):
        board.add({names.STEP_TIME: seconds}, kind="rollout", rollout_id=rollout_id)
    assert board.done == 3
    assert board.remaining_s() == 14.0
    board.add({names.STEP_TIME: 2.0}, kind="rollout", rollout_id=9)
    assert board.remaining_s() is None


def test_evaluations_are_collected_by_data_set():
    board = Scoreboard()
    for score in (0.1, 0.5):
        board.add(
            {"eval/add": score, "eval/add-truncated_ratio": 0.2, "eval/add/response_len/mean": 7.0},
            kind="eval",
            rollout_id=0,
        )
    assert board.evaluations == {"add": [0.1, 0.5]}
    assert board.done == 0


def test_phases_name_what_no_timer_accounts_for():
    metrics = {"perf/rollout_time": 0.5, "perf/actor_train_time": 0.3, names.STEP_TIME: 1.0}
    assert names.phases(metrics) == {"generate": 0.5, "train": 0.3, "other": pytest.approx(0.2)}


def test_sparkline_spans_the_range_and_skips_nan():
    assert sparkline([0.0, math.nan, 1.0], 10) == "▁█"
    assert sparkline([5.0, 5.0], 10) == "▁▁"
    assert len(sparkline([float(i) for i in range(100)], 10)) == 10
    assert sparkline([], 10) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.523, "0.52 s"), (48.4, "48 s"), (187, "3:07"), (7400, "2:03:20"), (59.9, "60 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.62, "0.62"), (12310.4, "12,310"), (0.0123456, "0.0123")])
def test_numbers(value, text):
    assert number(value) == text


def test_what_only_some_rollouts_do_is_not_carried_over():
    board = Scoreboard()
    board.add({names.LOSS: 0.5}, kind="train", rollout_id=0)
    board.add({"perf/eval_time": 3.0, names.STEP_TIME: 4.0}, kind="rollout", rollout_id=0)
    board.add({names.LOSS: 0.25}, kind="train", rollout_id=1)
    board.add({names.STEP_TIME: 1.0}, kind="rollout", rollout_id=1)
    assert board.latest == {names.LOSS: 0.25, names.STEP_TIME: 1.0}
