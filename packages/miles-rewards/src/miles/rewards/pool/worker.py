"""A worker: calls functions on batches of arguments until its socket closes.  The zygote forks it."""

from __future__ import annotations

import importlib
import os
import pickle
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from miles.rewards.pool.batch import Batch, read_batch
from miles.rewards.pool.job import Limits
from miles.rewards.pool.progress import LOADING, Desk, Progress
from miles.rewards.pool.reply import Answers
from miles.rewards.pool.wire import frame, read_frame

_FLUSH_AFTER_S = 0.025
"""Results wait this long at most for those of their neighbours."""

_Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its leading arguments."""


def serve(sock: socket.socket, progress: Progress, slot: int, limits: Limits) -> None:
    """Answer batches until the pool closes the socket."""
    _confine(limits)
    calls = _Calls(sock, progress.desk(slot))
    while (message := read_frame(sock)) is not None:
        calls.answer(message)
        if calls.exhausted:
            return


def _confine(limits: Limits) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    if not limits.write_files:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0,) if limits.show_output else (0, 1, 2):
        os.dup2(null, fd)


def resolve(path: str) -> Callable[..., Any]:
    """The function named ``package.module:attribute.of.it``."""
    module, _, attributes = path.partition(":")
    value: Any = importlib.import_module(module)
    for name in attributes.split("."):
        value = getattr(value, name)
    if not callable(value):
        raise TypeError(f"{path} is a {type(value).__name__}, not a function")
    return value  # type: ignore[no-any-return]


class _Calls:
    """The functions a worker knows, and the batch it works on."""

    def __init__(self, sock: socket.socket, desk: Desk) -> None:
        self._sock = sock
        self._desk = desk
        self._definitions: dict[int, tuple[str, bytes]] = {}
        self._functions: dict[int, _Call] = {}
        self._batch = 0
        self.exhausted = False
        """Whether memory ran out, so that this process should not go on."""

    def answer(self, message: memoryview) -> None:
        """Make the calls of a batch and send what they gave."""
        batch = read_batch(message)
        self._batch = batch.serial
        for key, function, bound in batch.definitions:
            self._definitions[key] = (function, bound)
        self._desk.rest(self._batch)
        answers, stopped = self._call_all(batch, message)
        if len(answers) or stopped:
            self._send(answers, stopped=stopped)

    def _call_all(self, batch: Batch, message: memoryview) -> tuple[Answers, bool]:
        """Make the calls; the last answers, and whether it stopped because the batch was recalled.

        This loop takes a tenth of a short grading's time, so it is spelled out.
        """
        serial, advance, clock = batch.serial, self._desk.advance, time.monotonic
        answers, position = Answers(serial, 0), 0
        started = flushed = clock()
        for key, skip, count, block in _blocks(batch, message):
            call = self._functions.get(key)
            if call is None:
                call = self._load(position, key)
                started = clock()
            advance(position, started)
            (function, leading), items = _unpacked(call, block, skip, count)
            for arguments in items:
                if advance(position, started) == serial:
                    return answers, True
                try:
                    value = function(*leading, *arguments)
                except BaseException as error:
                    ended = clock()
                    answers.add_error(_describe(error), ended - started)
                    if isinstance(error, MemoryError):
                        self.exhausted = True
                        return answers, False
                else:
                    ended = clock()
                    answers.add(value, ended - started)
                position, started = position + 1, ended
                if ended - flushed > _FLUSH_AFTER_S or answers.full:
                    self._send(answers)
                    answers = Answers(serial, position)
                    started = flushed = clock()
        return answers, False

    def _load(self, index: int, key: int) -> _Call:
        """Import a function; where that fails, get one that says so."""
        self._desk.advance(index, time.monotonic(), LOADING)
        function, bound = self._definitions[key]
        try:
            call = resolve(function), pickle.loads(bound)  # noqa: S301
        except BaseException as error:
            return _fail, (error,)
        self._functions[key] = call
        return call

    def _send(self, answers: Answers, *, stopped: bool = False) -> None:
        self._desk.rest(self._batch)
        self._sock.sendall(frame(answers.packed(stopped=stopped)))


def _blocks(batch: Batch, message: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """For each block its function's key, how many calls to pass over, how many to make, and its bytes."""
    sizes, at = zip(batch.lengths, batch.counts), batch.start
    for key, num_blocks, skip in batch.runs:
        for length, count in islice(sizes, num_blocks):
            yield key, skip, count, message[at : at + length]
            at, skip = at + length, 0


def _unpacked(call: _Call, block: memoryview, skip: int, count: int) -> tuple[_Call, list[tuple[Any, ...]]]:
    """The arguments of ``count`` calls; where they cannot be read, with a function that says so."""
    try:
        return call, pickle.loads(block)[skip : skip + count]  # noqa: S301
    except BaseException as error:
        return (_fail, (error,)), [()] * count


def _fail(error: BaseException, *arguments: Any) -> None:
    raise error.with_traceback(None)


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join(text[:600].split())[:300]
