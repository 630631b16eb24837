"""What a worker is asked: the calls of a batch.

A pickled heading goes to it as a message.  The blocks of pickled arguments lie in its tray, or behind the heading where
they are too long for that.  They were pickled once, by whoever asked; nobody looks at them before their calls are made.
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
    blocks: memoryview
    """One behind the other."""


def write_batch(serial: int, jobs: Sequence[Job], spans: Sequence[Span], tray: memoryview) -> bytes:
    """The message.  ``jobs`` are those that the worker hears of for the first time."""
    parts: list[memoryview] = []
    runs: list[tuple[int, int, int]] = []
    lengths, counts = array("Q"), array("Q")
    for span in spans:
        blocks, sizes, skip, numbers = span.ticket.calls.part(span.start, span.stop)
        parts.append(blocks)
        runs.append((span.ticket.job.key, len(sizes), skip))
        lengths.extend(sizes)
        counts.extend(numbers)
    definitions = [(job.key, job.function, job.packed) for job in jobs]
    heading = pickle.dumps((serial, definitions, runs, lengths, counts), protocol=5)
    head = _HEADING.pack(len(heading)) + heading
    if sum(lengths) > len(tray):
        return b"".join((head, *parts))
    at = 0
    for part in parts:
        tray[at : at + len(part)] = part
        at += len(part)
    return head


def read_batch(message: memoryview, tray: memoryview) -> Batch:
    """The batch in a message of the pool's own."""
    end = _HEADING.size + _HEADING.unpack_from(message)[0]
    serial, definitions, runs, lengths, counts = pickle.loads(message[_HEADING.size : end])  # noqa: S301
    return Batch(serial, definitions, runs, lengths, counts, message[end:] if end < len(message) else tray)
