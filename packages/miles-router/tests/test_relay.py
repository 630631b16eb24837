"""Long answers that the kernel forwards: whole, in order, and with the same outcome as any other."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest

from miles.router import relay
from miles.router.relay import KernelPipe, Relay, TargetLostError

pytestmark = pytest.mark.skipif(not hasattr(os, "splice"), reason="needs splice(2)")

LIMIT = 1 << 20
LONG = bytes(range(256)) * 20_000  # 5 MB


@pytest.fixture
def moved(monkeypatch) -> list[int]:
    """How many bytes each step moved."""
    steps: list[int] = []
    move = KernelPipe.move

    def counted(self, source, target, limit):
        count, rest = move(self, source, target, limit)
        steps.append(count)
        return count, rest

    monkeypatch.setattr(KernelPipe, "move", counted)
    return steps


@pytest.fixture
def pipe() -> Iterator[KernelPipe]:
    pipe = KernelPipe()
    yield pipe
    pipe.close()


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Two connections, one to read from and one to write to; ours are the second ends."""
    made = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(2):
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
            far.setblocking(False)
            made.append((near, far))
    yield made
    for pair in made:
        for end in pair:
            end.close()


def test_bytes_move_up_to_a_limit(pipe, pairs):
    (worker, source), (client, target) = pairs
    worker.sendall(b"hello, world")
    assert pipe.move(source.fileno(), target.fileno(), 5) == (5, b"")
    assert pipe.move(source.fileno(), target.fileno(), 100) == (7, b"")
    assert client.recv(12, socket.MSG_WAITALL) == b"hello, world"
    with pytest.raises(BlockingIOError):
        pipe.move(source.fileno(), target.fileno(), 100)
    worker.close()
    assert pipe.move(source.fileno(), target.fileno(), 100) == (0, b"")


def test_what_finds_no_room_comes_back(pipe, pairs):
    (worker, source), (client, target) = pairs
    target.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    worker.setblocking(False)
    sent = num_moved = 0
    rest = b""
    while not rest:
        sent += worker.send(LONG[sent : sent + 60_000])
        assert select.select([source], [], [], 10)[0]
        moved, rest = pipe.move(source.fileno(), target.fileno(), LIMIT)
        num_moved += moved
    taken = b""
    while len(taken) < num_moved - len(rest):
        taken += client.recv(1 << 16)
    assert taken + rest == LONG[:num_moved]


def test_a_lost_target_is_told_from_a_lost_source(pipe, pairs):
    (worker, source), (_, target) = pairs
    worker.sendall(b"hello")
    target.shutdown(socket.SHUT_WR)
    with pytest.raises(TargetLostError):
        pipe.move(source.fileno(), target.fileno(), 100)
    with pytest.raises(BlockingIOError):  # nothing was left in the pipe
        os.read(pipe._outlet, 1)
    source.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        pipe.move(-1, target.fileno(), 100)


class Transport:
    """Of a connection: what a relay asks of it."""

    def __init__(self, end: socket.socket, unsent: int = 0) -> None:
        self.end = end
        self.unsent = unsent
        self.aborted = self.paused = False

    def get_extra_info(self, name: str) -> socket.socket:
        return self.end

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True


class Connection:
    """To a worker: what becomes of its relay."""

    def __init__(self, end: socket.socket) -> None:
        self.transport = Transport(end)
        self.left = len(LONG)
        self.ended: tuple[int, bytes] | None = None

    def end_relay(self, moved: int, rest: bytes) -> None:
        self.ended = (moved, rest)


async def test_a_relay_leaves_a_slow_client_to_the_transports(pipe, pairs):
    (worker, source), (_, target) = pairs
    worker.sendall(b"hello")
    connection = Connection(source)
    running = Relay(pipe, Transport(target, unsent=1), connection)
    running.move()
    running.stop()
    assert connection.ended == (0, b"")
    assert connection.transport.paused


async def test_a_relay_drops_a_lost_client(pipe, pairs):
    (worker, source), (_, target) = pairs
    worker.sendall(b"hello")
    target.shutdown(socket.SHUT_WR)
    connection, client = Connection(source), Transport(target)
    running = Relay(pipe, client, connection)
    running.move()
    running.stop()
    assert client.aborted
    assert connection.ended == (0, b"")


async def test_a_relay_leaves_a_lost_worker_to_its_transport(pipe, pairs):
    (worker, source), (_, target) = pairs
    worker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    worker.close()  # with a reset
    connection = Connection(source)
    running = Relay(pipe, Transport(target), connection)
    assert select.select([source], [], [], 10)[0]
    running.move()
    running.stop()
    assert connection.ended == (0, b"")


async def test_a_relay_waits_for_more(pipe, pairs, until):
    (worker, source), (client, target) = pairs
    connection = Connection(source)
    running = Relay(pipe, Transport(target), connection)
    running.move()
    worker.sendall(b"hello")
    await until(lambda: connection.left == len(LONG) - 5)
    worker.close()
    await until(lambda: connection.ended == (0, b""))
    running.stop()
    assert client.recv(100) == b"hello"


async def long_answer(talk, body: bytes = LONG) -> None:
    await talk.answer(body)


async def test_a_long_answer_is_forwarded_by_the_kernel_and_its_connection_serves_on(make_worker, make_router, moved):
    worker = await make_worker(long_answer)
    router = await make_router(worker, health_check_interval_s=60)
    client = await router.connect()
    before = worker.connections
    for number in range(3):
        assert (await client.post()).body == LONG
        await router.settled(number + 1)
    assert sum(moved) > 2 * len(LONG)
    assert worker.connections == before + 1
    assert router.metrics.answered == 3


async def test_a_slow_reader_gets_a_long_answer_whole(make_worker, make_router, moved, until):
    worker = await make_worker(lambda talk: long_answer(talk, LONG * 8))
    router = await make_router(worker)
    client = await router.connect()
    client.writer.transport.pause_reading()
    await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    connections = router.server._uvicorn.server_state.connections
    await until(lambda: any(connection.flow.write_paused for connection in connections))
    client.writer.transport.resume_reading()
    assert (await client.response()).body == LONG * 8
    await router.settled()


async def test_a_worker_that_dies_in_a_long_answer_cuts_it_visibly(make_worker, make_router, moved):
    async def die(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (2 * len(LONG)) + LONG)
        talk.writer.close()

    worker = await make_worker(die)
    router = await make_router(worker)
    answer = await router.post()
    assert not answer.complete
    await router.settled()
    assert router.metrics.cut == 1
    assert moved


@pytest.mark.parametrize("resets", [True, False])
async def test_a_client_that_leaves_a_long_answer_frees_its_worker(make_worker, make_router, moved, until, resets):
    left = asyncio.Event()

    async def pause(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (2 * len(LONG)) + LONG)
        await talk.client_left()
        left.set()

    worker = await make_worker(pause)
    router = await make_router(worker)
    client = await router.connect()
    await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    await until(lambda: moved)
    if resets:
        client.reset()
    else:
        client.close()
    await asyncio.wait_for(left.wait(), 10)
    await router.settled()
    assert router.metrics.cancelled == 1


async def test_bytes_beyond_a_long_answer_never_reach_a_client(make_worker, make_router, moved):
    async def overfull(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(LONG) + LONG + b"HTTP/1.1 200 OK\r\n")

    worker = await make_worker(overfull)
    router = await make_router(worker, health_check_interval_s=60)
    client = await router.connect()
    before = worker.connections
    for _ in range(2):
        assert (await client.post()).body == LONG
    assert worker.connections == before + 2  # a connection with bytes left is not used again
    assert moved


async def test_a_long_answer_ends_with_the_router(make_worker, make_router, moved, until):
    async def pause(talk):
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (2 * len(LONG)) + LONG)
        await talk.client_left()

    worker = await make_worker(pause)
    router = await make_router(worker)
    client = await router.connect()
    await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    await until(lambda: moved)
    router.server.dispatcher.stop()
    assert not (await client.response()).complete
    await router.settled()


async def test_without_splice_long_answers_are_copied(make_worker, make_router, moved, monkeypatch):
    monkeypatch.setattr(relay, "can_relay", lambda transport: False)
    monkeypatch.setattr("miles.router.hot_exchange.can_relay", lambda transport: False)
    worker = await make_worker(long_answer)
    router = await make_router(worker)
    assert (await router.post()).body == LONG
    assert not moved
