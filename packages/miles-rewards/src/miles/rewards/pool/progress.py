"""A page of shared memory in which each worker notes what it is doing, so that saying so costs no message."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass

_NOTE = struct.Struct("=QIId")
_RECALL = struct.Struct("=Q")
_SLOT_BYTES = 64  # a cache line
_RECALL_OFFSET = 32

IDLE, LOADING, WORKING = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Note:
    """What a worker is doing."""

    batch: int
    index: int
    """Position of the current call in the batch."""
    phase: int
    """IDLE, LOADING (importing the function's module) or WORKING."""
    since: float
    """``time.monotonic()`` of the phase's start: one clock for all processes of a machine."""


class Progress:
    """Slots of notes, written by their worker, and of recalls, written by the pool."""

    def __init__(self, fd: int, num_slots: int) -> None:
        self._page = mmap.mmap(fd, num_slots * _SLOT_BYTES)

    @staticmethod
    def allocate(num_slots: int) -> int:
        """A file descriptor of zeroed shared memory with room for ``num_slots``."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("miles-rewards-progress")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, num_slots * _SLOT_BYTES)
        return fd

    def write(self, slot: int, batch: int, index: int, phase: int, now: float) -> None:
        _NOTE.pack_into(self._page, slot * _SLOT_BYTES, batch, index, phase, now)

    def read(self, slot: int) -> Note:
        """The slot's note, read twice so that a half-written one is not taken for a note."""
        start = slot * _SLOT_BYTES
        while True:
            first = self._page[start : start + _NOTE.size]
            if first == self._page[start : start + _NOTE.size]:
                return Note(*_NOTE.unpack(first))

    def recall(self, slot: int, batch: int) -> None:
        """Ask the worker not to start any more calls of ``batch``."""
        _RECALL.pack_into(self._page, slot * _SLOT_BYTES + _RECALL_OFFSET, batch)

    def recalled(self, slot: int) -> int:
        """The batch that was recalled last."""
        batch: int = _RECALL.unpack_from(self._page, slot * _SLOT_BYTES + _RECALL_OFFSET)[0]
        return batch

    def close(self) -> None:
        self._page.close()
