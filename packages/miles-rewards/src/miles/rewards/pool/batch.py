"""What a worker is asked: the calls of a batch in one message.

A pickled heading, then blocks of pickled arguments: they were pickled once, by whoever asked, and are neither copied
nor looked at before their calls are made.
"""

from __future__ import annotations

import pickle
import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from miles.rewards.pool.job import Job
from miles.rewards.pool.ticket import Span

_HEADING = struct.Struct("=Q")
_MANY_PIECES = 4
"""More pieces are put together: copying costs less than as many system calls."""

Buffer = bytes | memoryview


class Batch(NamedTuple):
    """A batch as its worker reads it."""

    serial: int
    definitions: list[tuple[int, str, bytes]]
    """Key, name and pickled leading arguments of functions that the worker does not know yet."""
    runs: list[tuple[int, int, int]]
    """Key of a function, how many of the next blocks are its, and how many calls of the first of them to pass over."""
    lengths: array[int]
    """Bytes of each block."""
    counts: array[int]
    """Calls to be made of each block."""
    start: int
    """Where in the message the first block begins."""


def write_batch(serial: int, jobs: Sequence[Job], spans: Sequence[Span]) -> list[Buffer]:
    """The message, in pieces.  ``jobs`` are those that the worker hears of for the first time."""
    pieces: list[Buffer] = []
    runs: list[tuple[int, int, int]] = []
    lengths, counts = array("Q"), array("Q")
    for span in spans:
        part = span.ticket.calls.part(span.start, span.stop)
        pieces.append(part.blocks)
        runs.append((span.ticket.job.key, len(part.lengths), part.skip))
        lengths.extend(part.lengths)
        counts.extend(part.counts)
    definitions = [(job.key, job.function, job.packed) for job in jobs]
    heading = pickle.dumps((serial, definitions, runs, lengths, counts), protocol=5)
    if len(pieces) > _MANY_PIECES:
        pieces = [b"".join(pieces)]
    return [_HEADING.pack(len(heading)) + heading, *pieces]


def read_batch(message: memoryview) -> Batch:
    """The batch in a message of the pool's own."""
    start = _HEADING.size + _HEADING.unpack_from(message)[0]
    serial, definitions, runs, lengths, counts = pickle.loads(message[_HEADING.size : start])  # noqa: S301
    return Batch(serial, definitions, runs, lengths, counts, start)
