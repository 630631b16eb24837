"""Arguments of calls on their way to a worker: pickled in blocks of neighbours.

A block costs a quarter of what as many pickles of one call do.  Only plain data stands in blocks of more than one call:
reading it back runs nobody's code, so that arguments that cannot be read, or that hang or kill who reads them, cost
their own call only.
"""

from __future__ import annotations

import pickle
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from operator import sub
from types import SimpleNamespace
from typing import Any, NamedTuple

_BLOCK_CALLS = 128
BLOCK_BYTES = 1 << 20
"""Longer texts go one by one: a block travels whole for each of its calls that goes alone."""

Arguments = tuple[Any, ...]


class Part(NamedTuple):
    """Neighbouring calls, as blocks that hold them."""

    blocks: memoryview
    lengths: list[int]
    """Bytes of each block."""
    skip: int
    """Calls of the first block that come before the part."""
    counts: list[int]
    """Calls of the part in each block."""


class Calls:
    """Blocks, one behind the other, so that neighbours are sent as they lie there."""

    __slots__ = ("_buffer", "_ends", "_firsts")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ends = [0]
        self._firsts = [0]
        """The number of each block's first call, and that of the next one to come."""

    def __len__(self) -> int:
        return self._firsts[-1]

    def add(self, block: bytes, num_calls: int = 1) -> None:
        """Put a block last."""
        self._buffer += block
        self._end_block(num_calls)

    def pack(self, items: Iterable[Arguments]) -> Iterator[tuple[int, Exception]]:
        """Put calls with ``items`` last; the places of those that cannot be pickled, and why, as they turn up."""
        rest, place, pickler = iter(items), 0, _PlainPickler(self._buffer)
        while neighbours := list(islice(rest, _BLOCK_CALLS)):
            if not self._pack_together(neighbours, pickler):
                pickler = _PlainPickler(self._buffer)  # a failure leaves traces in it
                yield from self._pack_one_by_one(neighbours, place)
            place += len(neighbours)

    def _pack_together(self, items: Sequence[Arguments], pickler: _PlainPickler) -> bool:
        """Put a block of all ``items`` last, if they are of plain data and not too long."""
        with suppress(Exception):  # whatever it is: it will happen again to the one call that it belongs to
            pickler.dump(items)
            if len(self._buffer) - self._ends[-1] <= BLOCK_BYTES:
                self._end_block(len(items))
                return True
        del self._buffer[self._ends[-1] :]
        return False

    def _end_block(self, num_calls: int) -> None:
        self._ends.append(len(self._buffer))
        self._firsts.append(self._firsts[-1] + num_calls)

    def _pack_one_by_one(self, items: Sequence[Arguments], place: int) -> Iterator[tuple[int, Exception]]:
        for number, arguments in enumerate(items, place):
            try:
                self.add(single_block(arguments))
            except Exception as error:
                yield number, error

    def num_fitting(self, start: int, num_bytes: int) -> int:
        """How many calls from ``start`` on stand in blocks of ``num_bytes`` together; those of one block at least."""
        low = bisect_right(self._firsts, start) - 1
        high = max(low + 1, bisect_right(self._ends, self._ends[low] + num_bytes) - 1)
        return self._firsts[high] - start

    def num_bytes(self, start: int, stop: int) -> int:
        """Of the blocks that hold calls ``start`` to ``stop - 1``."""
        low, high = bisect_right(self._firsts, start) - 1, bisect_left(self._firsts, stop)
        return self._ends[high] - self._ends[low]

    def part(self, start: int, stop: int) -> Part:
        """Calls ``start`` to ``stop - 1``.  No more calls can be added then."""
        low, high = bisect_right(self._firsts, start) - 1, bisect_left(self._firsts, stop)
        ends, bounds = self._ends[low : high + 1], [start, *self._firsts[low + 1 : high], stop]
        return Part(
            blocks=memoryview(self._buffer)[ends[0] : ends[-1]],
            lengths=list(map(sub, ends[1:], ends)),
            skip=start - self._firsts[low],
            counts=list(map(sub, bounds[1:], bounds)),
        )


def single_block(arguments: Arguments) -> bytes:
    """The block of one call.  Fails as pickling fails."""
    return pickle.dumps([arguments], protocol=5)


class _PlainPickler(pickle.Pickler):
    """Refuses what is not plain data, and keeps calls apart that share a list or a mapping."""

    def __init__(self, buffer: bytearray) -> None:
        """``buffer`` gets what is pickled.  One pickler for many blocks: it knows how much room one takes."""
        super().__init__(SimpleNamespace(write=buffer.__iadd__), protocol=5)
        self.fast = True  # no references from one call to what another holds

    def reducer_override(self, value: Any) -> Any:
        raise pickle.PicklingError(f"a {type(value).__name__} is not plain data")
