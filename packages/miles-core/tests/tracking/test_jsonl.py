import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.core.errors import CheckpointError
from miles.core.run_directory import RunDirectory
from miles.core.tracking.jsonl import JsonlTracker, read_records


def log(tracker, step, **metrics):
    tracker.log(metrics, step=step, kind="train", rollout_id=step)


def steps(tmp_path):
    return [record.step for record in read_records(RunDirectory(tmp_path).metrics)]


def test_events_read_back_as_logged(tmp_path):
    tracker = JsonlTracker(None, tmp_path)
    tracker.log({"train/loss": 0.1, "train/count": 3}, step=7, kind="train", rollout_id=2)
    tracker.close()
    (record,) = read_records(RunDirectory(tmp_path).metrics)
    assert (record.kind, record.step, record.rollout_id) == ("train", 7, 2)
    assert record.metrics == {"train/loss": 0.1, "train/count": 3}


def test_reopening_appends(tmp_path):
    for step in range(3):
        tracker = JsonlTracker(None, tmp_path)
        log(tracker, step, loss=1.0)
        tracker.close()
    assert steps(tmp_path) == [0, 1, 2]


def test_truncating_to_an_offset_forgets_what_came_later(tmp_path):
    tracker = JsonlTracker(None, tmp_path)
    log(tracker, 0, loss=1.0)
    offset = tracker.offset()
    log(tracker, 1, loss=2.0)
    tracker.close()

    resumed = JsonlTracker(None, tmp_path)
    resumed.truncate(offset)
    log(resumed, 5, loss=3.0)
    resumed.close()
    assert steps(tmp_path) == [0, 5]


def test_a_line_torn_by_a_crash_is_dropped(tmp_path):
    tracker = JsonlTracker(None, tmp_path)
    log(tracker, 0, loss=1.0)
    tracker.close()
    path = RunDirectory(tmp_path).metrics
    with path.open("ab") as stream:
        stream.write(b'{"kind": "train", "st')
    assert steps(tmp_path) == [0]
    resumed = JsonlTracker(None, tmp_path)
    log(resumed, 1, loss=1.0)
    resumed.close()
    assert steps(tmp_path) == [0, 1]


def test_an_offset_beyond_the_end_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl has 0 bytes, but 10 were there"):
        JsonlTracker(None, tmp_path).truncate(10)


def test_numbers_that_json_cannot_write_survive_in_strict_json(tmp_path):
    tracker = JsonlTracker(None, tmp_path)
    log(tracker, 0, nan=math.nan, up=math.inf, down=-math.inf)
    tracker.close()
    path = RunDirectory(tmp_path).metrics
    json.loads(path.read_text(), parse_constant=pytest.fail)
    (record,) = read_records(path)
    assert math.isnan(record.metrics["nan"])
    assert (record.metrics["up"], record.metrics["down"]) == (math.inf, -math.inf)


@given(value=st.floats(allow_nan=False))
def test_every_float_survives_bit_for_bit(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    tracker = JsonlTracker(None, path)
    log(tracker, 0, value=value)
    tracker.close()
    (record,) = read_records(RunDirectory(path).metrics)
    assert record.metrics["value"] == value


def test_a_missing_file_has_no_events(tmp_path):
    assert list(read_records(tmp_path / "metrics.jsonl")) == []
