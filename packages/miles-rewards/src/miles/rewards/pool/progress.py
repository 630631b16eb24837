"""Memory that the pool and its workers share.

Each worker notes there what it is doing, so that saying so costs no message.  Each has a tray there, on which the pool
lays what a batch is about, so that the system need not carry it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass

_SLOT_BYTES = 64  # a cache line
_SLOT_WORDS = 8
_BATCH, INDEX, _PHASE, _RECALLED = range(4)
"""Words of a slot."""

TRAY_BYTES = 4 << 20
"""Of each worker.  The system gives the memory when it is used for the first time."""

IDLE, LOADING, WORKING = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Note:
    """What a worker is doing."""

    batch: int
    index: int
    """Position of the current call in the batch."""
    phase: int
    """IDLE, LOADING (importing the function's module) or WORKING."""


class Desk:
    """A worker's view of its slot."""

    __slots__ = ("words",)

    def __init__(self, words: memoryview[int]) -> None:
        self.words = words
        """For the loop over a batch, which notes each call under ``INDEX`` itself."""

    def rest(self, batch: int) -> None:
        """Note that no call of ``batch`` is being worked on."""
        self.words[_PHASE] = IDLE
        self.words[_BATCH] = batch

    def advance(self, index: int, phase: int = WORKING) -> int:
        """Note work on a call of the batch; returns the batch that was recalled last.

        The recall is read last: either the worker learns of it before it starts the call, or the pool sees the call.
        """
        self.words[INDEX] = index
        self.words[_PHASE] = phase
        return self.words[_RECALLED]


class Progress:
    """Slots of notes, written by their worker, and of recalls, written by the pool; behind them the trays."""

    def __init__(self, fd: int, num_slots: int) -> None:
        self._memory = mmap.mmap(fd, num_slots * (_SLOT_BYTES + TRAY_BYTES))
        self._words = memoryview(self._memory)[: num_slots * _SLOT_BYTES].cast("Q")
        self._trays = memoryview(self._memory)[num_slots * _SLOT_BYTES :]

    @staticmethod
    def allocate(num_slots: int) -> int:
        """A file descriptor of zeroed shared memory with room for ``num_slots``."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("miles-rewards-progress")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, num_slots * (_SLOT_BYTES + TRAY_BYTES))
        return fd

    def desk(self, slot: int) -> Desk:
        """Where the worker of ``slot`` writes."""
        return Desk(self._words[slot * _SLOT_WORDS : (slot + 1) * _SLOT_WORDS])

    def tray(self, slot: int) -> memoryview:
        """Where the worker of ``slot`` finds its batch.  The pool writes there only while that worker has no calls."""
        return self._trays[slot * TRAY_BYTES : (slot + 1) * TRAY_BYTES]

    def read(self, slot: int) -> Note:
        """The slot's note, read twice so that a half-written one is not taken for a note."""
        start = slot * _SLOT_WORDS
        while True:
            note = self._words[start : start + _RECALLED].tolist()
            if note == self._words[start : start + _RECALLED].tolist():
                return Note(*note)

    def recall(self, slot: int, batch: int) -> None:
        """Ask the worker not to start any more calls of ``batch``."""
        self._words[slot * _SLOT_WORDS + _RECALLED] = batch

    def close(self) -> None:
        self._words.release()
        self._trays.release()
        self._memory.close()
