"""Where the samples of a pack begin and end, and how attention groups them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

# A bucket takes shorter segments until its padded size exceeds its tokens by this share: the price of one more kernel
# call against the price of attending to padding.
_MAX_PADDING = 0.15
# Segments up to this length share a bucket whatever the padding: kernels of that size cost more to call than to run.
_SHORT = 16


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive segments of similar length that attend in one batched call.

    ``start`` and ``stop`` are token positions in the pack; the call has shape [rows, width].
    """

    start: int
    stop: int
    rows: int
    width: int
    token_of_cell: torch.Tensor | None
    """[rows * width] token (counted from ``start``) of each padded cell; None when nothing is padded."""
    cell_of_token: torch.Tensor | None
    """[stop - start] padded cell of each token; None when nothing is padded."""


class Segments:
    """The segments of a pack, in order.  Computed once per micro-batch and used by every layer."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.device = device

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """[segments + 1] int32, where each segment begins (``cu_seqlens``)."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return torch.from_numpy(offsets).to(self.device)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Runs of neighbours of similar length.  Packs are sorted by length, so there are few."""
        buckets = []
        start = 0
        for run in _runs(self.lengths):
            buckets.append(_bucket(start, run, self.device))
            start = buckets[-1].stop
        return tuple(buckets)


def _runs(lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    first = tokens = width = 0
    for position, length in enumerate(lengths):
        rows = position - first + 1
        padded = max(width, length) * rows
        if rows > 1 and max(width, length) > _SHORT and padded > (1 + _MAX_PADDING) * (tokens + length):
            yield lengths[first:position]
            first, tokens, width = position, 0, 0
        tokens += length
        width = max(width, length)
    yield lengths[first:]


def _bucket(start: int, lengths: Sequence[int], device: torch.device) -> Bucket:
    rows, width, tokens = len(lengths), max(lengths), sum(lengths)
    if rows * width == tokens:
        return Bucket(start, start + tokens, rows, width, None, None)
    real = np.arange(width) < np.asarray(lengths)[:, None]
    cell_of_token = np.flatnonzero(real)
    token_of_cell = np.zeros(rows * width, dtype=np.int64)
    token_of_cell[cell_of_token] = np.arange(tokens)
    return Bucket(
        start,
        start + tokens,
        rows,
        width,
        torch.from_numpy(token_of_cell).to(device),
        torch.from_numpy(cell_of_token).to(device),
    )
