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
from functools import partial
from itertools import islice
from typing import Any

from miles.rewards.pool.batch import Batch, read_batch
from miles.rewards.pool.job import Limits
from miles.rewards.pool.progress import INDEX, LOADING, Desk, Progress
from miles.rewards.pool.reply import NOTHING, Answers, Failure
from miles.rewards.pool.wire import frame, read_frame

_FLUSH_AFTER_S = 0.1
"""Results wait this long at most for those of their neighbours.  Not longer than the pool's patience: who took longer
for a call looks whether the rest was taken back."""

_Function = Callable[..., Any]


def serve(sock: socket.socket, progress: Progress, slot: int, limits: Limits) -> None:
    """Answer batches until the pool closes the socket."""
    _confine(limits)
    calls = _Calls(sock, progress.desk(slot), progress.tray(slot))
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

    def __init__(self, sock: socket.socket, desk: Desk, tray: memoryview) -> None:
        self._sock = sock
        self._desk = desk
        self._tray = tray
        self._definitions: dict[int, tuple[str, bytes]] = {}
        self._functions: dict[int, _Function] = {}
        self._batch = 0
        self.exhausted = False
        """Whether memory ran out, so that this process should not go on."""

    def answer(self, message: memoryview) -> None:
        """Make the calls of a batch and send what they gave."""
        batch = read_batch(message, self._tray)
        self._batch = batch.serial
        for key, function, bound in batch.definitions:
            self._definitions[key] = (function, bound)
        self._desk.rest(self._batch)
        answers, stopped = self._call_all(batch)
        if len(answers) or stopped:
            self._send(answers, stopped=stopped)

    def _call_all(self, batch: Batch) -> tuple[Answers, bool]:
        """Make the calls; the last answers, and whether it stopped because the batch was recalled.

        What surrounds a call is paid for every sample and all of it is cold after a grading: it is spelled out, and as
        little as possible.
        """
        serial, words, clock = batch.serial, self._desk.words, time.monotonic
        answers, first, flush_at = Answers(serial, 0), 0, 0.0
        for key, skip, count, block in _blocks(batch):
            function = self._functions.get(key) or self._load(first, key)
            started = clock()
            flush_at = flush_at or started + _FLUSH_AFTER_S
            if self._desk.advance(first) == serial:
                return answers, True
            function, items = _unpacked(function, block, skip, count)
            codes, seconds, last, code = answers.codes, answers.seconds, NOTHING, 0
            for position, arguments in enumerate(items, first):
                words[INDEX] = position
                try:
                    value = function(*arguments)
                except BaseException as error:
                    value = self._failure(error)
                if value is not last:
                    code, last = answers.code(value)
                    if answers.full or self.exhausted:
                        flush_at = 0.0
                ended = clock()
                codes.append(code)
                seconds.append(ended - started)
                started = ended
                if ended > flush_at:
                    if self.exhausted:
                        return answers, False
                    self._send(answers)
                    answers = Answers(serial, position + 1)
                    codes, seconds, last = answers.codes, answers.seconds, NOTHING
                    if self._desk.advance(position + 1) == serial:
                        return answers, True
                    started = clock()
                    flush_at = started + _FLUSH_AFTER_S
            first += count
        return answers, False

    def _failure(self, error: BaseException) -> Failure:
        self.exhausted = isinstance(error, MemoryError)
        return Failure(_describe(error))

    def _load(self, index: int, key: int) -> _Function:
        """Import a function and give it its leading arguments; where that fails, get one that says so."""
        self._desk.advance(index, LOADING)
        path, bound = self._definitions[key]
        try:
            function, leading = resolve(path), pickle.loads(bound)  # noqa: S301
        except BaseException as error:
            return partial(_fail, error)
        self._functions[key] = partial(function, *leading) if leading else function
        return self._functions[key]

    def _send(self, answers: Answers, *, stopped: bool = False) -> None:
        self._desk.rest(self._batch)
        self._sock.sendall(frame(answers.packed(stopped=stopped)))


def _blocks(batch: Batch) -> Iterator[tuple[int, int, int, memoryview]]:
    """For each block its function's key, how many calls to pass over, how many to make, and its bytes."""
    sizes, at = zip(batch.lengths, batch.counts), 0
    for key, num_blocks, skip in batch.runs:
        for length, count in islice(sizes, num_blocks):
            yield key, skip, count, batch.blocks[at : at + length]
            at, skip = at + length, 0


def _unpacked(function: _Function, block: memoryview, skip: int, count: int) -> tuple[_Function, list[tuple[Any, ...]]]:
    """The arguments of ``count`` calls; where they cannot be read, with a function that says so."""
    try:
        return function, pickle.loads(block)[skip : skip + count]  # noqa: S301
    except BaseException as error:
        return partial(_fail, error), [()] * count


def _fail(error: BaseException, *arguments: Any) -> None:
    raise error.with_traceback(None)


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # an exception of the user's own may be broken too
        return name
    return " ".join(f"{name}: {text}"[:600].split())[:300] if text else name
