"""Heads that were read before, found by their bytes.

Clients and workers send nearly the same head again and again; only the length of the body differs.  Looking a head up
without those digits costs a fraction of reading it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic, TypeVar

Meaning = TypeVar("Meaning")

_BEFORE_LENGTH = b"ength: "  # of "Content-Length: 5", in any of its usual spellings
_LENGTH_DIGITS = 18
_MAX_HEAD_BYTES = 4096  # of a head that is remembered
_MAX_HEADS = 1024


class HeadMemo(Generic[Meaning]):
    """Reads heads that match ``pattern``, whose ``length_group`` is the value of Content-Length.

    ``meaning`` says what to remember of a match, whatever the length; None: this head is not for us.
    """

    def __init__(
        self, pattern: re.Pattern[bytes], length_group: int, meaning: Callable[[re.Match[bytes]], Meaning | None]
    ) -> None:
        self._pattern = pattern
        self._length_group = length_group
        self._meaning = meaning
        self._known: dict[bytes, Meaning] = {}
        self._last: tuple[bytes, bytes, Meaning] | None = None  # bytes around the length of the head found last

    def read(self, data: bytes) -> tuple[Meaning, int, int] | None:
        """Meaning of the head that ``data`` begins with, length of the body, end of the head; None without a match."""
        last = self._last
        if last is not None and data.startswith(last[0]):
            at = len(last[0])
            stop = data.find(b"\r", at, at + 20)
            digits = data[at:stop]
            if data.startswith(last[1], stop) and digits.isdigit() and len(digits) <= _LENGTH_DIGITS:
                return last[2], int(digits), stop + len(last[1])
        return self._look_up(data)

    def _look_up(self, data: bytes) -> tuple[Meaning, int, int] | None:
        at = data.find(_BEFORE_LENGTH, 0, _MAX_HEAD_BYTES) + 7
        stop = data.find(b"\r", at, at + 20)
        digits = data[at:stop]
        if digits.isdigit() and stop - at <= _LENGTH_DIGITS:
            end = data.find(b"\r\n\r\n", stop, _MAX_HEAD_BYTES)
            if end > 0:
                before, after = data[:at], data[stop:end]
                meaning = self._known.get(before + after)
                if meaning is not None:
                    self._last = before, after + b"\r\n\r\n", meaning
                    return meaning, int(digits), end + 4
        return self._read_unknown(data, at)

    def _read_unknown(self, data: bytes, at: int) -> tuple[Meaning, int, int] | None:
        match = self._pattern.match(data)
        meaning = self._meaning(match) if match is not None else None
        if match is None or meaning is None:
            return None
        first, last = match.span(self._length_group)
        end = match.end()
        # Two heads of one key differ in these digits only: the key has the place where they begin.
        if first == at and end <= _MAX_HEAD_BYTES:
            if len(self._known) >= _MAX_HEADS:
                self._known.clear()
            self._known[data[:at] + data[last : end - 4]] = meaning
        return meaning, int(data[first:last]), end
