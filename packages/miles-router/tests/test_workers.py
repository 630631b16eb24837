"""The states of a worker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.core.errors import ConfigError
from miles.router.workers import Fleet, WorkerState, parse_worker


def fleet_of(*names: str) -> tuple[Fleet, list]:
    fleet = Fleet(failure_threshold=3, readmission_checks=2)
    workers = [fleet.add(f"http://{name}:1") for name in names]
    for worker in workers:
        fleet.probe_passed(worker, None)
    return fleet, workers


def test_a_new_worker_gets_nothing_before_its_first_check():
    fleet = Fleet(failure_threshold=3, readmission_checks=2)
    worker = fleet.add("http://a:1")
    assert (worker.state, fleet.ready) == ("probing", [])
    fleet.probe_passed(worker, None)
    assert (worker.state, fleet.ready) == ("healthy", [worker])


def test_a_new_worker_that_does_not_answer_is_quarantined_at_once():
    fleet = Fleet(failure_threshold=3, readmission_checks=2)
    worker = fleet.add("http://a:1")
    fleet.probe_failed(worker, "refused")
    assert (worker.state, worker.reason) == ("quarantined", "refused")


def test_failed_checks_lead_over_suspicion_to_quarantine():
    fleet, (a, b) = fleet_of("a", "b")
    fleet.probe_failed(a, "x")
    assert (a.state, fleet.ready) == ("suspect", [b])
    fleet.probe_failed(a, "x")
    assert a.state == "suspect"
    fleet.probe_failed(a, "x")
    assert a.state == "quarantined"


def test_one_good_check_ends_suspicion():
    fleet, (a, b) = fleet_of("a", "b")
    fleet.probe_failed(a, "x")
    fleet.probe_passed(a, None)
    assert (a.state, a.probe_failures, fleet.ready) == ("healthy", 0, [a, b])


def test_quarantine_ends_after_several_good_checks_in_a_row():
    fleet, (a,) = fleet_of("a")
    for _ in range(3):
        fleet.probe_failed(a, "x")
    fleet.probe_passed(a, None)
    assert a.state == "probing"
    fleet.probe_failed(a, "x")
    assert a.state == "quarantined"
    fleet.probe_passed(a, None)
    fleet.probe_passed(a, None)
    assert a.state == "healthy"


def test_suspects_serve_when_nobody_is_healthy():
    fleet, (a, b) = fleet_of("a", "b")
    fleet.probe_failed(a, "x")
    fleet.probe_failed(b, "x")
    assert fleet.ready == [a, b]


def test_a_request_ends_suspicion_only_where_checks_do_not_fail():
    fleet, (a, b) = fleet_of("a", "b")
    fleet.request_failed(a, "reset", "x")
    assert a.state == "suspect"
    fleet.request_succeeded(a)
    assert (a.state, a.request_failures) == ("healthy", 0)
    fleet.probe_failed(b, "x")
    fleet.request_succeeded(b)
    assert b.state == "suspect"


def test_a_worker_back_from_failed_requests_is_on_probation():
    fleet, (a, _) = fleet_of("a", "b")
    for _ in range(5):
        fleet.request_failed(a, "reset", "x")
    assert a.state == "quarantined"
    fleet.probe_passed(a, None)
    fleet.probe_passed(a, None)
    assert a.state == "healthy"
    fleet.request_failed(a, "reset", "x")
    assert a.state == "quarantined"


def test_the_last_worker_is_not_taken_out_for_its_answers():
    fleet, (a,) = fleet_of("a")
    for _ in range(10):
        fleet.request_failed(a, "status", "answered 500")
    assert fleet.ready == [a]
    fleet.request_failed(a, "reset", "died")
    assert fleet.ready == []


def test_a_failed_request_asks_for_a_check():
    fleet, (a,) = fleet_of("a")
    a.wake.clear()
    fleet.request_failed(a, "reset", "x")
    assert a.wake.is_set()


def test_draining_workers_get_nothing_and_may_be_added_again():
    fleet, (a, b) = fleet_of("a", "b")
    a.in_flight = 1
    fleet.drain(a)
    assert fleet.ready == [b]
    assert not a.drained.is_set()
    assert fleet.add("http://A:1/") is a
    assert fleet.ready == [a, b]


def test_a_worker_that_is_forgotten_is_gone():
    fleet, (a, b) = fleet_of("a", "b")
    fleet.drain(a)
    assert a.drained.is_set()
    fleet.discard(a)
    assert (list(fleet), len(fleet), fleet.ready) == ([b], 1, [b])


@pytest.mark.parametrize(
    ("fleet_version", "own", "admitted"),
    [
        *[("7", "7", True), ("7", "6", False), ("7", "8", True), ("7", None, True), (None, "3", True)],
        *[("a", "b", False), ("default", "3", True), ("3", "default", False)],
    ],
)
def test_admission_asks_for_the_weights_of_the_fleet(fleet_version, own, admitted):
    fleet, (a,) = fleet_of("a")
    fleet.probe_passed(a, fleet_version)
    late = fleet.add("http://late:1")
    fleet.probe_passed(late, own)
    assert (late.state == "healthy") is admitted
    if not admitted:
        assert f"holds weights {own}, not {fleet_version}" in late.reason
        fleet.probe_passed(late, fleet_version)
        assert late.state == "healthy"


def test_the_version_of_the_fleet_is_the_newest_number_or_the_commonest_name():
    fleet, (a, b, c) = fleet_of("a", "b", "c")
    fleet.probe_passed(a, "9")
    fleet.probe_passed(b, "10")
    assert fleet.weight_version == "10"
    fleet.probe_passed(a, "x")
    fleet.probe_passed(b, "y")
    fleet.probe_passed(c, "y")
    assert fleet.weight_version == "y"
    for worker in (a, b, c):
        for _ in range(3):
            fleet.probe_failed(worker, "gone")
    assert fleet.weight_version == "y"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("http://a:1", ("http://a:1", 1.0)), (" http://a:1=2.5 ", ("http://a:1", 2.5)), ("https://b", ("https://b", 1.0))],
)
def test_workers_are_written_with_an_optional_weight(text, expected):
    assert parse_worker(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a:1",
        "ftp://a:1",
        "http://",
        "http://a:b",
        "http://a:1/path",
        "http://u@a:1",
        "http://a:1?x=1",
        "http://a:1=x",
        "http://é:1",
    ],
)
def test_other_ways_to_write_a_worker_are_refused(text):
    with pytest.raises(ConfigError, match="expected"):
        parse_worker(text)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_is_a_positive_number(weight):
    with pytest.raises(ConfigError, match="weight"):
        Fleet(failure_threshold=3, readmission_checks=2).add("http://a:1", weight)
    with pytest.raises(ConfigError, match="weight"):
        parse_worker(f"http://a:1={weight}")


def test_default_ports_and_tls_follow_from_the_scheme():
    fleet = Fleet(failure_threshold=3, readmission_checks=2)
    plain, secure = fleet.add("http://a"), fleet.add("https://a")
    assert (plain.address, plain.tls) == (("a", 80), None)
    assert secure.address == ("a", 443)
    assert secure.tls is not None


EVENTS = st.sampled_from(["pass", "fail", "reset", "status", "ok", "drain", "add"])


@given(st.lists(st.tuples(st.integers(0, 2), EVENTS), max_size=60))
def test_whatever_happens_the_ready_workers_are_the_best_there_are(events):
    fleet, workers = fleet_of("a", "b", "c")
    for index, event in events:
        worker = workers[index]
        if event == "pass":
            fleet.probe_passed(worker, None)
        elif event == "fail":
            fleet.probe_failed(worker, "x")
        elif event in ("reset", "status"):
            fleet.request_failed(worker, event, "x")
        elif event == "ok":
            fleet.request_succeeded(worker)
        elif event == "drain":
            fleet.drain(worker)
        else:
            fleet.add(worker.url)
        serving = [one for one in workers if not one.draining]
        healthy = [one for one in serving if one.state is WorkerState.HEALTHY]
        suspects = [one for one in serving if one.state is WorkerState.SUSPECT]
        assert fleet.ready == (healthy or suspects)
        assert all(one.state is not WorkerState.HEALTHY or one.probe_failures == 0 for one in workers)
