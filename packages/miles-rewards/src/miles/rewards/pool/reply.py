"""What a worker answers: results of neighbouring calls of a batch, packed.

A header, the seconds of each call, a code for each call, and JSON with what the codes stand for.  Not pickle: whoever
reads it must not run what a process made of untrusted text.  Many calls return one and the same constant, such as
``(1.0, "correct")``: it travels once.
"""

from __future__ import annotations

import json
import struct
from array import array
from dataclasses import dataclass
from itertools import starmap
from typing import Any, NamedTuple

from miles.rewards.pool.results import Ending, Results
from miles.rewards.pool.wire import MAX_REPLY_BYTES

_HEADER = struct.Struct("=QII?")
_MAX_VALUE_BYTES = MAX_REPLY_BYTES // 2
_FULL_BYTES = 1 << 20
_MAX_CONSTANT_CHARS = 200
_OTHER = 1 << 15
"""Codes from here on are those of values that travel one by one; constants come before."""


class Reply(NamedTuple):
    """Results of calls number ``first`` and following of a batch."""

    batch: int
    first: int
    results: Results
    stopped: bool
    """Whether the worker begins no more calls of the batch, because it was recalled."""


NOTHING = object()
"""What no function returns."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Stands for the value of a call that has none."""

    why: str


class Answers:
    """Collects results in a worker, which notes a code and the seconds of every call."""

    __slots__ = ("_batch", "_constants", "_first", "_known", "_num_bytes", "_others", "codes", "full", "seconds")

    def __init__(self, batch: int, first: int) -> None:
        self.codes: list[int] = []
        self.seconds: list[float] = []
        self.full = False
        """Whether it is time to send, lest the message grow too long."""
        self._batch = batch
        self._first = first
        self._constants: list[Any] = []
        self._known: dict[int, int] = {}
        """Codes of the constants by ``id``, which stays theirs as long as ``_constants`` holds them."""
        self._others: list[str] = []
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self.codes)

    def code(self, value: Any) -> tuple[int, Any]:
        """The code of what a call returned, and the one object that surely has the same code; ``NOTHING`` if none has.

        It is an error's code when ``value`` is a ``Failure`` or not plain data.
        """
        code = self._known.get(id(value))
        if code is not None:
            return code, value
        if isinstance(value, Failure):
            return self._other(json.dumps([None, value.why])), NOTHING
        if not _is_constant(value):
            return self._other(_encoded(value)), NOTHING
        code = self._known[id(value)] = len(self._constants)
        self._constants.append(value)
        return code, value

    def packed(self, *, stopped: bool) -> bytes:
        """The message; ``stopped`` if no more calls of the batch will be made, because it was recalled."""
        table = f"[{json.dumps(self._constants)},[{','.join(self._others)}]]".encode()
        header = _HEADER.pack(self._batch, self._first, len(self.codes), stopped)
        return b"".join((header, array("f", self.seconds).tobytes(), array("H", self.codes).tobytes(), table))

    def _other(self, text: str) -> int:
        self._others.append(text)
        self._num_bytes += len(text)
        self.full = self._num_bytes > _FULL_BYTES
        return _OTHER + len(self._others) - 1


def _is_constant(value: Any) -> bool:
    """Whether nothing can change ``value``, and it surely becomes short JSON."""
    if isinstance(value, tuple):
        return len(value) <= 4 and all(not isinstance(entry, tuple) and _is_constant(entry) for entry in value)
    if value.__class__ is str:
        return len(value) <= _MAX_CONSTANT_CHARS
    return value is None or value.__class__ in (float, bool)


def _encoded(value: Any) -> str:
    """``value`` as it is now: a function may return the same dictionary again, changed."""
    try:
        text = json.dumps([value], default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        return json.dumps([None, f"returned a {type(value).__name__} that is not plain data ({error})"[:300]])
    if len(text) > _MAX_VALUE_BYTES:
        return json.dumps([None, f"returned {len(text)} bytes; the limit is {_MAX_VALUE_BYTES}"])
    return text


def _plain(value: Any) -> Any:
    """Numbers of NumPy and torch as Python numbers."""
    if hasattr(value, "item") and getattr(value, "size", 1) in (1,):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a result")


def read_reply(payload: bytes) -> Reply:
    """The results in a message.  Raises ValueError, TypeError or LookupError for what is no honest one."""
    if len(payload) < _HEADER.size:
        raise ValueError("a message without a header")
    batch, first, count, stopped = _HEADER.unpack_from(payload)
    seconds, codes = array("f"), array("H")
    split = _HEADER.size + count * seconds.itemsize
    end = split + count * codes.itemsize
    if len(payload) <= end:
        raise ValueError("a message that is cut off")
    seconds.frombytes(payload[_HEADER.size : split])
    codes.frombytes(payload[split:end])
    constants, others = json.loads(payload[end:])
    endings: list[Ending] = [("ok", value, "") for value in constants]
    if others:
        table = dict(enumerate(endings)) | dict(enumerate(starmap(_ending, others), _OTHER))
        return Reply(batch, first, Results(list(map(table.__getitem__, codes)), seconds), stopped)
    return Reply(batch, first, Results(list(map(endings.__getitem__, codes)), seconds), stopped)


def _ending(value: Any, why: str | None = None) -> Ending:
    return ("ok", value, "") if why is None else ("error", None, why)
