import os
import socket

import pytest

from miles.rewards.pool.batch import read_batch
from miles.rewards.pool.calls import Calls
from miles.rewards.pool.job import Job
from miles.rewards.pool.member import Member
from miles.rewards.pool.progress import Progress
from miles.rewards.pool.reply import Answers
from miles.rewards.pool.ticket import ThreadSink, Ticket, whole
from miles.rewards.pool.wire import frame, read_frame

JOB = Job("module:function")


class Worker:
    """The other end of a member, which does what the test says."""

    def __init__(self, sock, progress):
        self.sock = sock
        self.desk = progress.desk(0)
        self.tray = progress.tray(0)

    def receive(self):
        """The next batch, and whether it came in the message."""
        message = read_frame(self.sock)
        batch = read_batch(message, self.tray)
        self.desk.rest(batch.serial)
        return batch, batch.blocks is not self.tray

    def answer(self, batch, first, count, *, stopped=False):
        self.desk.rest(batch.serial)
        answers = Answers(batch.serial, first)
        for _ in range(count):
            answers.codes.append(answers.code(1.0)[0])
            answers.seconds.append(0.1)
        self.sock.sendall(frame(answers.packed(stopped=stopped)))


@pytest.fixture
def ends():
    fd = Progress.allocate(1)
    progress = Progress(fd, 1)
    os.close(fd)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield Member(0, 1, ours, progress), Worker(theirs, progress)


def spans(size):
    calls = Calls()
    calls.add(b"block", size)
    return [whole(Ticket(JOB, calls, 1.0, ThreadSink()))]


def test_arguments_lie_in_the_tray(ends):
    member, worker = ends
    for _ in range(2):
        member.give(spans(3))
        batch, in_message = worker.receive()
        assert (bytes(batch.blocks[:5]), in_message) == (b"block", False)
        worker.answer(batch, 0, 3)
        assert len(member.read()[0][0][1]) == 3


def test_the_tray_is_not_written_while_a_batch_that_was_taken_back_may_be_read(ends):
    member, worker = ends
    member.give(spans(3))
    batch, _ = worker.receive()
    worker.desk.advance(0)
    assert [span.size for span in member.recall(0.0, 0.0)] == [2]
    worker.answer(batch, 0, 1)
    assert [len(results) for _, results in member.read()[0]] == [1]
    assert member.num_open == 0
    in_message = []
    for _ in range(2):
        member.give(spans(3))
        batch, late = worker.receive()
        in_message.append(late)
        worker.answer(batch, 0, 3)
        member.read()
    assert in_message == [True, False]
