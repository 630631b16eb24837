"""Several trackers, one of which misbehaves."""

import pytest

from miles.core.flags.logging import Logging
from miles.core.tracking import trackers
from miles.core.tracking.jsonl import JsonlTracker
from miles.core.tracking.trackers import Trackers

EVENTS: list[str] = []


class Quiet:
    def __init__(self, config, run_dir):
        EVENTS.append("opened")

    def log(self, metrics, *, step, kind, rollout_id):
        EVENTS.append(f"{kind} {step}")

    def close(self):
        EVENTS.append("closed")


class FailsAtStart(Quiet):
    def __init__(self, config, run_dir):
        raise ConnectionError("no server")


class FailsAtEnd(Quiet):
    def close(self):
        raise ConnectionError("no server any more")


def opened(run_dir, monkeypatch, *classes):
    EVENTS.clear()
    monkeypatch.setattr(trackers, "tracker_names", lambda logging: [f"{__name__}.{one.__name__}" for one in classes])
    monkeypatch.setattr(trackers.TRACKERS, "get", lambda name: globals()[name.rpartition(".")[2]])
    return Trackers.open({Logging: Logging()}, run_dir)


def test_every_tracker_gets_every_event(tmp_path, monkeypatch):
    with opened(tmp_path, monkeypatch, Quiet, Quiet) as both:
        both.log({"train/loss": 1.0}, step=3, kind="train", rollout_id=1)
    assert EVENTS == ["opened", "opened", "train 3", "train 3", "closed", "closed"]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_tracker_that_cannot_start_leaves_none_open(tmp_path, monkeypatch):
    with pytest.raises(ConnectionError, match="no server"):
        opened(tmp_path, monkeypatch, Quiet, FailsAtStart)
    assert EVENTS == ["opened", "closed"]


def test_tracker_that_cannot_end_spares_the_others(tmp_path, monkeypatch):
    journal_closed = []
    close = JsonlTracker.close
    monkeypatch.setattr(JsonlTracker, "close", lambda self: (journal_closed.append(True), close(self)))
    running = opened(tmp_path, monkeypatch, Quiet, FailsAtEnd, Quiet)
    with pytest.raises(ConnectionError, match="any more"):
        running.close()
    assert EVENTS.count("closed") == 2
    assert journal_closed
