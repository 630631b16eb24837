import pickle
from itertools import islice

import pytest

from miles.rewards.pool.batch import read_batch, write_batch
from miles.rewards.pool.calls import Calls
from miles.rewards.pool.job import Job
from miles.rewards.pool.ticket import Span, ThreadSink, Ticket

FIRST, SECOND = Job("module:first"), Job("module:second", bound=(1,))


def ticket(job, items):
    calls = Calls()
    assert not list(calls.pack(items))
    return Ticket(job, calls, 1.0, ThreadSink())


def read(batch):
    """Key and arguments of each call, as a worker reads them."""
    sizes, at = zip(batch.lengths, batch.counts, strict=True), 0
    for key, num_blocks, skip in batch.runs:
        for length, count in islice(sizes, num_blocks):
            yield from ((key, *call) for call in pickle.loads(batch.blocks[at : at + length])[skip : skip + count])
            at, skip = at + length, 0


@pytest.mark.parametrize("tray_bytes", [0, 100, 1 << 20])
def test_a_batch_is_read_as_it_was_written_whether_it_fits_the_tray_or_not(tray_bytes):
    spans = [
        Span(ticket(FIRST, [(place, "text") for place in range(300)]), 100, 290),
        Span(ticket(SECOND, [(frozenset,), (2,)]), 0, 2),
    ]
    tray = memoryview(bytearray(tray_bytes))
    batch = read_batch(memoryview(write_batch(7, [SECOND], spans, tray)), tray)
    assert (batch.serial, batch.definitions) == (7, [(SECOND.key, "module:second", SECOND.packed)])
    expected = [(FIRST.key, place, "text") for place in range(100, 290)]
    assert list(read(batch)) == [*expected, (SECOND.key, frozenset), (SECOND.key, 2)]


def test_what_fits_the_tray_is_not_in_the_message():
    tray = memoryview(bytearray(1 << 20))
    spans = [Span(ticket(FIRST, [("x" * 1000,)] * 100), 0, 100)]
    assert len(write_batch(1, [], spans, tray)) < 1000
    assert len(write_batch(1, [], spans, tray[:0])) > 100_000
