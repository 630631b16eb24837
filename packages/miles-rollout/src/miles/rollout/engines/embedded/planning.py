"""The layout of a forward pass: decoding sequences first, then blocks of prompts, then rows that fill it up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from miles.rollout.engines.embedded.attention import QUERY_MULTIPLE, SPAN, Ints, Plan, Segment
from miles.rollout.engines.embedded.kv import TOKEN_MULTIPLE, Pool
from miles.rollout.engines.embedded.sequence import Seats, Sequence

CHUNK = 512
"""Prompt tokens of one sequence that are computed at once: bounds the attention weights held in memory."""


@dataclass(slots=True, eq=False)
class Block:
    """The tokens of ``sequence`` from ``start`` on, to be computed; those before are stored."""

    sequence: Sequence
    tokens: list[int]
    start: int = 0

    @property
    def pool(self) -> Pool[Sequence]:
        assert self.sequence.pool is not None
        return self.sequence.pool

    @property
    def num_rows(self) -> int:
        """Rows it takes, filled up."""
        return padded_length(len(self.tokens) - self.start)


def padded_length(num_tokens: int) -> int:
    """Rows for a block: blocks of about one length are computed together."""
    quantum = QUERY_MULTIPLE if num_tokens <= 64 else 16 if num_tokens <= 128 else TOKEN_MULTIPLE
    return -(-num_tokens // quantum) * quantum


def make_plan(
    decoding: Iterable[tuple[Pool[Sequence], int]], blocks: list[Block], seats: Seats, row_multiple: int
) -> tuple[Plan, list[int]]:
    """Plan one row for each of the first sequences of each pool, and ``blocks``; a multiple of ``row_multiple`` rows.

    Returns the plan and the row of each block's last token.
    """
    tokens: list[Ints] = []
    positions: list[Ints] = []
    segments: list[Segment] = []
    num_rows = 0
    for pool, count in decoding:
        ids = np.fromiter((owner.seat for owner in pool.owners[:count]), np.int64, count)
        tokens.append(seats.last[ids])
        positions.append(seats.held[ids])
        segments.append(_segment(pool, 0, positions[-1][:, None], num_rows))
        num_rows += count
    last_rows: list[int] = []
    for alike in _alike(blocks):
        width = alike[0].num_rows
        places = np.tile(np.arange(alike[0].start, alike[0].start + width), (len(alike), 1))
        segments.append(_segment(alike[0].pool, alike[0].sequence.slot, places, num_rows))
        positions.append(places.reshape(-1))
        for block in alike:
            wanted = block.tokens[block.start :]
            row = np.zeros(width, np.int64)
            row[: len(wanted)] = wanted
            tokens.append(row)
            last_rows.append(num_rows + len(wanted) - 1)
            num_rows += width
    filling = np.zeros(-num_rows % row_multiple, np.int64)
    plan = Plan(
        torch.from_numpy(np.concatenate([*tokens, filling])),
        torch.from_numpy(np.concatenate([*positions, filling])),
        segments,
    )
    return plan, last_rows


def _alike(blocks: list[Block]) -> Iterator[list[Block]]:
    """Runs of blocks of one shape in neighbouring slots."""

    def shape(item: tuple[int, Block]) -> tuple[int, int, int, int]:
        number, block = item
        return (block.pool.capacity, block.start, block.num_rows, block.sequence.slot - number)

    for _, run in groupby(enumerate(blocks), shape):
        yield [block for _, block in run]


def _segment(pool: Pool[Sequence], first_slot: int, positions: Ints, first_row: int) -> Segment:
    num_tokens = -(-(int(positions.max()) + 1) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    if pool.capacity <= SPAN and 2 * num_tokens > pool.capacity:
        num_tokens = pool.capacity  # short slots one after the other are read faster than with gaps between them
    return Segment(pool, first_slot, num_tokens, first_row, positions)
