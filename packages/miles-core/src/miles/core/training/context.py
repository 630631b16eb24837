"""Context parallelism: several ranks share every sample of a pack.

Each rank holds some tokens of the pack (see ``zigzag``).  It computes everything for them alone; only attention gathers
the keys and values of all ranks.  A rank's consecutive tokens of one sample make a *row*: its queries, and as keys the
sample up to the last of them.

P = tokens of the pack, W = tokens on each rank, C = ranks, S = samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from miles.core.training.segments import SHORT, Cells, Runs, Segments, runs_of
from miles.core.training.zigzag import ZigZag
from miles.core.types.batch import Ints

# Their names since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Rows share a call of the attention kernel until the padded area of its scores exceeds theirs by this share.
_MAX_PADDING = 0.25


class ContextGroup:
    """The ranks that share samples."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.index: int = dist.get_rank(group)
        self.count: int = dist.get_world_size(group)

    def sum(self, x_S: torch.Tensor) -> torch.Tensor:
        """``x_S`` summed over the ranks, differentiably: every rank's loss depends on every rank's part."""
        total_S: torch.Tensor = _Sum.apply(x_S, self.group)
        return total_S

    def gather(self, x_W: torch.Tensor) -> torch.Tensor:
        """[W, ...] of every rank, end to end: [C * W, ...].  The gradient is the sum over ranks."""
        gathered: torch.Tensor = _Gather.apply(x_W, self.group, self.count)
        return gathered


class _Sum(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Gather(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x_W: torch.Tensor, group: dist.ProcessGroup, count: int) -> torch.Tensor:
        ctx.group, ctx.count = group, count
        gathered = x_W.new_empty((count * len(x_W), *x_W.shape[1:]))
        _all_gather(gathered, x_W.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        own = grad.new_empty((len(grad) // ctx.count, *grad.shape[1:]))
        _reduce_scatter(own, grad.contiguous(), group=ctx.group)
        return own, None, None


@dataclass(frozen=True, slots=True)
class Row:
    """Consecutive tokens of one sample that this rank holds."""

    queries: Ints
    """Their places on this rank."""
    first: int
    """Position in the sample of the first of them."""
    keys: Ints
    """Gathered places of the sample's tokens, up to the last of them."""


@dataclass(frozen=True, slots=True)
class RowBucket:
    """Rows that attend in one call: queries of shape [rows, query_width] to keys of shape [rows, key_width]."""

    query_start: int
    """First of its cells among those of all buckets."""
    key_start: int
    rows: int
    query_width: int
    key_width: int
    position_of_query: torch.Tensor
    """[rows, query_width] in the sample; padding repeats the last one."""

    def mask(self, window: int | None) -> torch.Tensor:
        """[rows, 1, query_width, key_width]: True where a query may look."""
        distance = self.position_of_query[:, :, None] - torch.arange(
            self.key_width, device=self.position_of_query.device
        )
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        return allowed[:, None]


class ContextSegments(Segments):
    """The samples of a pack as attention sees them on one of several ranks.

    ``token_of_position`` as in ``Segments``.  ``spans`` are begin and length in the pack of each sample's prompt and
    response, in turn; samples may share a prompt.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        token_of_position: Ints,
        spans: tuple[Ints, Sequence[int]],
        group: ContextGroup,
    ) -> None:
        super().__init__(lengths, device, token_of_position)
        self.group = group
        self._spans = [(int(start), int(length)) for start, length in zip(*spans, strict=True)]
        self._zigzag = ZigZag({start: length for start, length in self._spans if length}.items(), group.count)
        self._own = self._zigzag.tokens(group.index)

    @property
    def num_rows(self) -> int:
        return self._zigzag.width

    @cached_property
    def held(self) -> Ints:
        """[W] token of the pack at each place of this rank.  A rank with less than W repeats the pack's first."""
        return np.pad(self._own, (0, self._zigzag.width - len(self._own)))

    @cached_property
    def place_of_token(self) -> Ints:
        """[P] place on this rank of each token of the pack; -1 for the tokens of others."""
        places = np.full(len(self._zigzag.gathered), -1)
        places[self._own] = np.arange(len(self._own))
        return places

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """By descending number of keys."""
        return tuple(sorted(self._rows(), key=lambda row: (-len(row.keys), -len(row.queries))))

    @cached_property
    def row_buckets(self) -> tuple[RowBucket, ...]:
        buckets: list[RowBucket] = []
        query_start = key_start = 0
        for run in self._similar_rows:
            query_width, key_width = _widths(run)
            positions = [_padded(row.first + np.arange(len(row.queries)), query_width) for row in run]
            position_of_query = torch.from_numpy(np.stack(positions)).to(self._device)
            buckets.append(RowBucket(query_start, key_start, len(run), query_width, key_width, position_of_query))
            query_start += len(run) * query_width
            key_start += len(run) * key_width
        return tuple(buckets)

    @cached_property
    def query_cells(self) -> Cells:
        """The queries of all buckets, from the tokens of this rank."""
        return self._cells([_filled(row.queries, _widths(run)[0]) for run in self._similar_rows for row in run], 1)

    @cached_property
    def key_cells(self) -> Cells:
        """The keys of all buckets, from the gathered tokens of all ranks."""
        filled = [_filled(row.keys, _widths(run)[1]) for run in self._similar_rows for row in run]
        return self._cells(filled, self.group.count)

    @cached_property
    def query_runs(self) -> Runs:
        queries = [row.queries for row in self.rows]
        return runs_of(self._cells(queries, 1), [len(run) for run in queries], self._device)

    @cached_property
    def key_runs(self) -> Runs:
        keys = [row.keys for row in self.rows]
        return runs_of(self._cells(keys, self.group.count), [len(run) for run in keys], self._device)

    def masks(self, window: int | None) -> list[torch.Tensor]:
        """Of each bucket; made once for all layers with the same window."""
        if window not in self._masks:
            self._masks[window] = [bucket.mask(window) for bucket in self.row_buckets]
        return self._masks[window]

    @cached_property
    def _masks(self) -> dict[int | None, list[torch.Tensor]]:
        return {}

    @cached_property
    def _similar_rows(self) -> tuple[Sequence[Row], ...]:
        return tuple(_similar(self.rows))

    def _cells(self, parts: Sequence[Ints], num_ranks: int) -> Cells:
        """Of the tokens that ``num_ranks`` ranks hold."""
        return Cells(np.concatenate(parts), num_ranks * self._zigzag.width, self._device)

    def _rows(self) -> Iterator[Row]:
        """Of each prompt once, of each response, and of the padding."""
        gathered, index, width = self._zigzag.gathered, self.group.index, self._zigzag.width
        seen = set()
        for (prompt, prompt_length), (response, length) in zip(self._spans[::2], self._spans[1::2], strict=True):
            before = gathered[prompt : prompt + prompt_length]
            if prompt not in seen:
                seen.add(prompt)
                yield from self._rows_of(prompt, prompt_length, before[:0])
            yield from self._rows_of(response, length, before)
        padding = np.arange(len(self._own), width)
        if len(padding):
            yield Row(padding, 0, index * width + padding)

    def _rows_of(self, start: int, length: int, before: Ints) -> Iterator[Row]:
        """Of one piece, whose sample has ``before`` in front of it."""
        if not length:
            return
        gathered = self._zigzag.gathered
        for begin, end in self._zigzag.piece(start).spans[self.group.index]:
            queries = self.place_of_token[start + begin : start + end]
            yield Row(queries, len(before) + begin, np.concatenate([before, gathered[start : start + end]]))


def _similar(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Cut rows of descending size where one more would pad too much."""
    first = area = query_width = 0
    for at, row in enumerate(rows):
        key_width, query_width = len(rows[first].keys), max(query_width, len(row.queries))
        padded = query_width * key_width * (at - first + 1)
        own = len(row.queries) * len(row.keys)
        if key_width > SHORT and padded > (1 + _MAX_PADDING) * (area + own):
            yield rows[first:at]
            first, area, query_width = at, 0, len(row.queries)
        area += own
    yield rows[first:]


def _widths(run: Sequence[Row]) -> tuple[int, int]:
    return max(len(row.queries) for row in run), max(len(row.keys) for row in run)


def _padded(positions: Ints, width: int) -> Ints:
    return np.pad(positions, (0, width - len(positions)), mode="edge")


def _filled(tokens: Ints, width: int) -> Ints:
    return np.pad(tokens, (0, width - len(tokens)), constant_values=-1)
