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

Reply = list[Any]
"""``[index, status, value, detail, seconds]``."""


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
        self._functions: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        self._batch = 0
        self.exhausted = False
        """Whether memory ran out, so that this process should not go on."""

    def answer(self, message: bytes) -> None:
        # The pool's own messages: it pickled them from its caller's arguments.
        self._batch, definitions, items = pickle.loads(message)  # noqa: S301
        for key, function, bound in definitions:
            self._definitions[key] = (function, bound)
        replies: list[Reply] = []
        flushed = time.monotonic()
        for index, (key, arguments) in enumerate(items):
            if self._progress.recalled(self._slot) == self._batch:
                break
            replies.append(self._call(index, key, arguments))
            if self.exhausted or time.monotonic() - flushed > _FLUSH_AFTER_S:
                self._send(replies)
                replies, flushed = [], time.monotonic()
            if self.exhausted:
                return
        if replies:
            self._send(replies)

    def _call(self, index: int, key: int, arguments: bytes) -> Reply:
        started = time.monotonic()
        try:
            function, bound = self._functions.get(key) or self._load(index, key)
            started = self._note(index, WORKING)
            value = function(*bound, *pickle.loads(arguments))  # noqa: S301
            return [index, "ok", value, "", time.monotonic() - started]
        except BaseException as error:
            self.exhausted = isinstance(error, MemoryError)
            return [index, "error", None, _describe(error), time.monotonic() - started]

    def _load(self, index: int, key: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        self._note(index, LOADING)
        function, bound = self._definitions[key]
        self._functions[key] = resolve(function), pickle.loads(bound)  # noqa: S301
        return self._functions[key]

    def _note(self, index: int, phase: int) -> float:
        now = time.monotonic()
        self._progress.write(self._slot, self._batch, index, phase, now)
        return now

    def _send(self, replies: list[Reply]) -> None:
        self._note(0, IDLE)
        self._sock.sendall(frame(_encode(self._batch, replies)))


def _describe(error: BaseException) -> str:
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
    index, _, value, _, seconds = reply
    try:
        size = len(json.dumps(reply, default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        detail = f"returned a {type(value).__name__} that is not plain data ({error})"
        return [index, "error", None, detail[:300], seconds]
    if size > _MAX_VALUE_BYTES:
        return [index, "error", None, f"returned {size} bytes; the limit is {_MAX_VALUE_BYTES}", seconds]
    return reply


def _plain(value: Any) -> Any:
    """Numbers of NumPy and torch as Python numbers."""
    if hasattr(value, "item") and getattr(value, "size", 1) in (1,):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a result")
