"""Arguments of calls on their way to a worker: pickled in blocks of neighbours.

A block costs a quarter of what as many pickles of one call do.  Only plain data stands in blocks of more than one call:
reading it back runs nobody's code, so that arguments that cannot be read, or that hang or kill who reads them, cost
their own call only.
"""

from __future__ import annotations

import pickle
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
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

    blocks: list[bytes]
    skip: int
    """Calls of the first block that come before the part."""
    counts: list[int]
    """Calls of the part in each block."""


class Calls:
    """Blocks in the order of their calls."""

    __slots__ = ("_blocks", "_ends", "_firsts")

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._ends = [0]
        """Bytes up to the end of each block, after those up to its beginning."""
        self._firsts = [0]
        """The number of each block's first call, and that of the next one to come."""

    def __len__(self) -> int:
        return self._firsts[-1]

    def add(self, block: bytes, num_calls: int = 1) -> None:
        """Put a block last."""
        self._blocks.append(block)
        self._ends.append(self._ends[-1] + len(block))
        self._firsts.append(self._firsts[-1] + num_calls)

    def pack(self, items: Iterable[Arguments]) -> Iterator[tuple[int, Exception]]:
        """Put calls with ``items`` last; the places of those that cannot be pickled, and why, as they turn up."""
        rest, place, pickler = iter(items), 0, _PlainPickler()
        while neighbours := list(islice(rest, _BLOCK_CALLS)):
            block = pickler.block(neighbours)
            if block is not None:
                self.add(block, len(neighbours))
            else:
                pickler = _PlainPickler()  # a failure may leave traces in it
                yield from self._pack_one_by_one(neighbours, place)
            place += len(neighbours)

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
        """Calls ``start`` to ``stop - 1``."""
        low, high = bisect_right(self._firsts, start) - 1, bisect_left(self._firsts, stop)
        bounds = [start, *self._firsts[low + 1 : high], stop]
        return Part(self._blocks[low:high], start - self._firsts[low], list(map(sub, bounds[1:], bounds)))


def single_block(arguments: Arguments) -> bytes:
    """The block of one call.  Fails as pickling fails."""
    return pickle.dumps([arguments], protocol=5)


class _PlainPickler(pickle.Pickler):
    """Makes blocks of several calls.

    Refuses what is not plain data, and keeps calls apart that share a list or a mapping.  One for many blocks: it
    remembers how much room they take.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        super().__init__(SimpleNamespace(write=self._pieces.append), protocol=5)
        self.fast = True  # no references from one call to what another holds

    def block(self, items: list[Arguments]) -> bytes | None:
        """The block of ``items``; None if they are not all plain data, or too long."""
        try:
            self.dump(items)
        except Exception:  # whatever it is: it will happen again to the one call that it belongs to
            return None
        block = b"".join(self._pieces)
        self._pieces.clear()
        return block if len(block) <= BLOCK_BYTES else None

    def reducer_override(self, value: Any) -> Any:
        raise pickle.PicklingError(f"a {type(value).__name__} is not plain data")
