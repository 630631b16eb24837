"""Shared memory through which a trainer streams tensors to engines, which copy them out right behind it.

It is a ring, small enough to stay in the processor's cache: what passes through it never goes to main memory and back.
Counts in the same memory tell how far each side is, so a stream is one request, however long it is.

The memory holds a cache line with the trainer's count, one with each reader's, and the ring.  A position is a number of
bytes from the beginning of the stream; its place in the ring is the remainder.  A ring that holds a whole stream needs
no reader to count.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import xxhash

from miles.core.errors import WeightSyncError
from miles.core.weights.checksum import copied, copy, lies_in_order

LINE_BYTES = 64
STEP_BYTES = 256 << 10
"""Copied at once.  Source and target fit the cache of one core."""
PATIENCE_S = 120.0
_GIVEN_UP = -1
_YIELDS = 200
"""Before the first nap: the other side is mostly a step ahead or behind."""
_NAP_S = 20e-6


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where things are in the memory."""

    num_readers: int
    ring_bytes: int

    @property
    def start(self) -> int:
        """Of the ring."""
        return LINE_BYTES * (1 + self.num_readers)

    @property
    def num_bytes(self) -> int:
        """Of all."""
        return self.start + self.ring_bytes


class _Count:
    """One number in shared memory, written by one side."""

    def __init__(self, memory: torch.Tensor, line: int) -> None:
        self._memory = memory  # lives as long as the address is used
        self._cell = ctypes.c_int64.from_address(memory.data_ptr() + line * LINE_BYTES)

    @property
    def value(self) -> int:
        return self._cell.value

    def set(self, position: int) -> None:
        self._cell.value = position

    def wait(self, position: int, check: Callable[[], None]) -> None:
        """Return once ``position`` is reached.  ``check`` is called now and then, to raise when it never will be."""
        yields = 0
        while self._cell.value < position:
            yields += 1
            if yields < _YIELDS:
                os.sched_yield()
            else:
                check()
                time.sleep(_NAP_S)


class RingWriter:
    """The trainer's side of ``memory``, uint8.

    Sets all counts to nothing.  ``check`` raises when a reader will not read on.
    """

    def __init__(self, memory: torch.Tensor, layout: RingLayout, check: Callable[[], None]) -> None:
        self._filled, *self._taken = (_Count(memory, line) for line in range(1 + layout.num_readers))
        self._ring = memory[layout.start : layout.num_bytes]
        self._check = check
        for count in (self._filled, *self._taken):
            count.set(0)

    def write(self, position: int, tensor: torch.Tensor) -> str:
        """Put the tensor there, as readers make room.  Returns the checksum of what was put there."""
        flat, digest = tensor.detach().contiguous().view(-1).view(torch.uint8), xxhash.xxh3_64()
        for start, place, size in _steps(position, flat.numel(), self._ring.numel()):
            end = position + start + size
            for count in self._taken if end > self._ring.numel() else ():
                count.wait(end - self._ring.numel(), self._check)
            if flat.device.type == "cpu":
                copied(self._ring.data_ptr() + place, flat.data_ptr() + start, size, digest)
            else:
                room = self._ring[place : place + size]
                digest.update(room.copy_(flat[start : start + size]).numpy())
            self._filled.set(end)
        return digest.hexdigest()

    def give_up(self) -> None:
        """No more will come: whoever waits gets an error."""
        self._filled.set(_GIVEN_UP)


class RingReader:
    """The side of reader number ``reader``.  Reads every tensor once, in the order of the stream."""

    def __init__(self, memory: torch.Tensor, layout: RingLayout, reader: int, patience_s: float = PATIENCE_S) -> None:
        self._filled, self._taken = _Count(memory, 0), _Count(memory, 1 + reader)
        self._ring = memory[layout.start : layout.num_bytes]
        self._patience_s = patience_s
        self._seen, self._deadline = _GIVEN_UP, 0.0

    def read(self, position: int, target: torch.Tensor) -> str:
        """Fill ``target``, which lies in order on the host; the checksum of what it holds then.

        WeightSyncError when the trainer gave up, or nothing came for as long as the reader's patience lasts.
        """
        address, digest = target.data_ptr(), xxhash.xxh3_64()
        self._taken.set(position)  # what lies between two tensors is taken, too
        for start, place, size in _steps(position, target.nbytes, self._ring.numel()):
            end = position + start + size
            self._filled.wait(end, self._check)
            copied(address + start, self._ring.data_ptr() + place, size, digest)
            self._taken.set(end)
        return digest.hexdigest()

    def _check(self) -> None:
        filled = self._filled.value
        if filled == _GIVEN_UP:
            raise WeightSyncError("the trainer gave the update up before all of its bytes were there")
        if filled != self._seen:
            self._seen, self._deadline = filled, time.monotonic() + self._patience_s
        elif time.monotonic() > self._deadline:
            raise WeightSyncError(f"the trainer stopped at byte {filled} of the update, {self._patience_s:g} s ago")


@dataclass(frozen=True, slots=True)
class Incoming:
    """A tensor in a stream.  It can be had once."""

    reader: RingReader
    position: int
    dtype: torch.dtype
    shape: torch.Size

    def copy_into(self, target: torch.Tensor) -> str:
        """Fill ``target``, of the same shape; the checksum of what it holds then, in the dtype that came."""
        if target.dtype == self.dtype and lies_in_order(target):
            return self.reader.read(self.position, target)
        return copy(target, self.whole())

    def whole(self) -> torch.Tensor:
        """In memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.reader.read(self.position, tensor)
        return tensor


def _steps(position: int, num_bytes: int, ring_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Offset in the tensor, place in the ring, and bytes of each step."""
    start = 0
    while start < num_bytes:
        place = (position + start) % ring_bytes
        size = min(STEP_BYTES, num_bytes - start, ring_bytes - place)
        yield start, place, size
        start += size
