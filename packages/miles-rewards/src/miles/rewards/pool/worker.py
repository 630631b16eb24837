"""A worker: calls functions on batches of arguments until its socket closes.  The zygote forks it."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import resource
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from miles.rewards.pool.job import Limits
from miles.rewards.pool.progress import IDLE, LOADING, WORKING, Progress
from miles.rewards.pool.wire import MAX_REPLY_BYTES, frame, read_frame

_MAX_VALUE_BYTES = MAX_REPLY_BYTES // 1024
_FLUSH_AFTER_S = 0.005
"""Results wait this long at most for those of their neighbours."""

_Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its leading arguments."""

Reply = list[Any]
"""``[index, seconds, value]`` of a call that returned, ``[index, seconds, None, why]`` of one that did not."""


def serve(sock: socket.socket, progress: Progress, slot: int, limits: Limits) -> None:
    """Answer batches until the pool closes the socket."""
    _confine(limits)
    calls = _Calls(sock, progress, slot)
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

    def __init__(self, sock: socket.socket, progress: Progress, slot: int) -> None:
        self._sock = sock
        self._progress = progress
        self._slot = slot
        self._definitions: dict[int, tuple[str, bytes]] = {}
        self._functions: dict[int, _Call] = {}
        self._batch = 0
        self.exhausted = False
        """Whether memory ran out, so that this process should not go on."""

    def answer(self, message: bytes) -> None:
        # The pool's own messages: it pickled them from its caller's arguments.
        self._batch, definitions, items = pickle.loads(message)  # noqa: S301
        for key, function, bound in definitions:
            self._definitions[key] = (function, bound)
        replies: list[Reply] = []
        started = flushed = time.monotonic()
        for index, (key, arguments) in enumerate(items):
            call = self._functions.get(key)
            if call is None:
                call = self._load(index, key)
                started = time.monotonic()
            self._note(index, WORKING, started)
            reply = self._call(call, arguments)
            ended = time.monotonic()
            reply[:0] = index, round(ended - started, 7)
            replies.append(reply)
            if self.exhausted or ended - flushed > _FLUSH_AFTER_S:
                self._send(replies)
                replies, flushed = [], time.monotonic()
                if self.exhausted or self._progress.recalled(self._slot) == self._batch:
                    return
            started = max(ended, flushed)
        if replies:
            self._send(replies)

    def _call(self, call: _Call, arguments: bytes) -> Reply:
        function, bound = call
        try:
            return [function(*bound, *pickle.loads(arguments))]  # noqa: S301
        except BaseException as error:
            self.exhausted = isinstance(error, MemoryError)
            return [None, _describe(error)]

    def _load(self, index: int, key: int) -> _Call:
        """Import a function; where that fails, get one that says so."""
        self._note(index, LOADING, time.monotonic())
        function, bound = self._definitions[key]
        try:
            call = resolve(function), pickle.loads(bound)  # noqa: S301
        except BaseException as error:
            return _refuse, (_describe(error),)
        self._functions[key] = call
        return call

    def _note(self, index: int, phase: int, since: float) -> None:
        self._progress.write(self._slot, self._batch, index, phase, since)

    def _send(self, replies: list[Reply]) -> None:
        self._note(0, IDLE, time.monotonic())
        self._sock.sendall(frame(_encode(self._batch, replies)))


class _NotLoaded(Exception):
    """A function could not be imported."""


def _refuse(why: str, *arguments: Any) -> None:
    raise _NotLoaded(why)


def _describe(error: BaseException) -> str:
    if isinstance(error, _NotLoaded):
        return str(error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join(text[:600].split())[:300]


def _encode(batch: int, replies: list[Reply]) -> bytes:
    # JSON and not pickle: whoever reads it must not run what a process made of untrusted text.
    try:
        payload = json.dumps([batch, replies], default=_plain).encode()
    except (TypeError, ValueError, RecursionError):
        payload = b""
    if 0 < len(payload) <= MAX_REPLY_BYTES:
        return payload
    return json.dumps([batch, [_sendable(reply) for reply in replies]], default=_plain).encode()


def _sendable(reply: Reply) -> Reply:
    index, seconds, value = reply[:3]
    try:
        size = len(json.dumps(reply, default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        detail = f"returned a {type(value).__name__} that is not plain data ({error})"
        return [index, seconds, None, detail[:300]]
    if size > _MAX_VALUE_BYTES:
        return [index, seconds, None, f"returned {size} bytes; the limit is {_MAX_VALUE_BYTES}"]
    return reply


def _plain(value: Any) -> Any:
    """Numbers of NumPy and torch as Python numbers."""
    if hasattr(value, "item") and getattr(value, "size", 1) in (1,):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a result")
