import pytest

from miles.rewards.pool.backlog import Backlog
from miles.rewards.pool.calls import Calls
from miles.rewards.pool.job import Job
from miles.rewards.pool.ticket import Span, ThreadSink, Ticket, whole

JOB = Job("module:function")


def ticket(size: int, job: Job = JOB) -> Ticket:
    calls = Calls()
    for place in range(size):
        calls.add(bytes([place % 256]))
    return Ticket(job, calls, 1.0, ThreadSink())


def limits(spans):
    return [(span.start, span.stop) for span in spans]


def test_a_batch_of_a_function_nobody_knows_is_short():
    backlog = Backlog()
    backlog.add([whole(ticket(1000))])
    assert limits(backlog.take(share=1000)) == [(0, 41)]
    assert len(backlog) == 959


def test_short_calls_make_long_batches_and_one_slow_call_does_not_end_that():
    backlog = Backlog()
    long = ticket(100_000)
    backlog.add([whole(long)])
    backlog.learn(Span(long, 0, 10), 10 * 1e-5)
    backlog.learn(Span(long, 10, 11), 2.0)
    (batch,) = backlog.take(share=100_000)
    assert 500 < batch.size <= 1000


def test_a_share_is_not_exceeded():
    backlog = Backlog()
    tickets = [ticket(3) for _ in range(4)]
    for one in tickets:
        backlog.learn(whole(one), 1e-5)
    backlog.add(map(whole, tickets))
    assert limits(backlog.take(share=5)) == [(0, 3), (0, 2)]
    assert limits(backlog.take(share=5)) == [(2, 3), (0, 3), (0, 1)]
    assert len(backlog) == 2


def test_a_batch_of_long_texts_has_a_limit_in_bytes():
    calls = Calls()
    for _ in range(200):
        calls.add(bytes(4 << 20))
    backlog, long = Backlog(), Ticket(JOB, calls, 1.0, ThreadSink())
    backlog.learn(whole(long), 1e-5)
    backlog.add([whole(long)])
    taken = []
    while backlog:
        (span,) = backlog.take(share=200)
        assert calls.num_bytes(span.start, span.stop) <= 16 << 20
        taken += range(span.start, span.stop)
    assert taken == list(range(200))


def test_cancelled_calls_are_passed_over():
    backlog = Backlog()
    gone, here = ticket(3), ticket(2)
    backlog.add([whole(gone), whole(here)])
    gone.cancelled = True
    assert [span.ticket for span in backlog.take(share=16)] == [here]
    assert not backlog


@pytest.mark.parametrize("place", [0, 1])
def test_a_call_that_killed_a_worker_goes_alone(place):
    backlog = Backlog()
    killer, other = Span(ticket(1), 0, 1, retried=True), whole(ticket(2))
    backlog.add([killer, other] if place == 0 else [other, killer])
    batches = [backlog.take(share=16), backlog.take(share=16)]
    assert batches[place] == [killer]
    assert batches[1 - place] == [other]


def test_calls_given_back_come_first():
    backlog = Backlog()
    first, second = whole(ticket(2)), whole(ticket(2))
    backlog.add([second])
    backlog.put_back([first])
    assert backlog.take(share=2) == [first]
