"""The samples of a pack as attention sees them: each one whole, with its prompt, from its first token on.

A pack holds a prompt once for all samples that begin with it.  Attention needs every sample whole, so it lays the
pack's tokens out in *cells*, one per token of each sample, and takes the outputs back from one cell per token.

P = tokens of the pack, C = cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from miles.core.training.short_attention import ShortRows
from miles.core.types.batch import Ints

# A bucket takes shorter samples until its padded size exceeds its tokens by this share: the price of one more kernel
# call against the price of attending to padding.
_MAX_PADDING = 0.15
# Samples up to this length share a bucket whatever the padding: kernels of that size cost more to call than to run.
SHORT = 16


@dataclass(frozen=True, slots=True)
class Bucket:
    """Samples of similar length that attend in one batched call of shape [rows, width]."""

    start: int
    """First of its rows * width cells."""
    rows: int
    width: int


class Cells:
    """A layout of samples.  ``token_of_cell_C`` is -1 for padding."""

    def __init__(self, token_of_cell_C: Ints, num_tokens: int, device: torch.device) -> None:
        self.is_identity = bool(len(token_of_cell_C) == num_tokens and (token_of_cell_C == np.arange(num_tokens)).all())
        self.num_cells = len(token_of_cell_C)
        self._token_of_cell_C = token_of_cell_C
        self._num_tokens = num_tokens
        self._device = device

    def spread(self, x_P: torch.Tensor) -> torch.Tensor:
        """[P, ...] to [C, ...]; padding repeats token 0.  The gradient of a token is the sum over its cells."""
        spread_C: torch.Tensor = x_P if self.is_identity else _Spread.apply(x_P, self)
        return spread_C

    def collect(self, x_C: torch.Tensor) -> torch.Tensor:
        """[C, ...] to [P, ...]: the first cell of each token, which must have one.  Other cells get no gradient."""
        collected_P: torch.Tensor = x_C if self.is_identity else _Collect.apply(x_C, self)
        return collected_P

    @cached_property
    def token_of_cell(self) -> torch.Tensor:
        """[C], with token 0 for padding."""
        return self._tensor(np.maximum(self._token_of_cell_C, 0))

    @cached_property
    def first_cell_of_token(self) -> torch.Tensor:
        """[P]."""
        cells, starts = self._cells_by_token
        return self._tensor(cells[starts])

    @cached_property
    def cells_of_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells sorted by token, without padding; and [P] where those of each token begin."""
        cells, starts = self._cells_by_token
        return self._tensor(cells), self._tensor(starts)

    @cached_property
    def one_each(self) -> bool:
        """Whether every token has exactly one cell."""
        cells, starts = self._cells_by_token
        return len(cells) == self._num_tokens and bool((starts == np.arange(self._num_tokens)).all())

    @cached_property
    def _cells_by_token(self) -> tuple[Ints, Ints]:
        order = np.argsort(self._token_of_cell_C, kind="stable")
        cells = order[np.count_nonzero(self._token_of_cell_C < 0) :]
        starts = np.searchsorted(self._token_of_cell_C[cells], np.arange(self._num_tokens))
        return cells, starts

    def _tensor(self, array: Ints) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


class _Spread(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x_P: torch.Tensor, cells: Cells) -> torch.Tensor:
        ctx.cells = cells
        return x_P.index_select(0, cells.token_of_cell)

    @staticmethod
    def backward(ctx: Any, grad_C: torch.Tensor) -> tuple[torch.Tensor, None]:
        cells: Cells = ctx.cells
        if cells.one_each:
            return grad_C.index_select(0, cells.first_cell_of_token), None
        # A bag is a sum of rows, in a fixed order, also on accelerators, where index_add_ has none.
        order, starts = cells.cells_of_token
        sums = F.embedding_bag(order, grad_C.reshape(len(grad_C), -1), starts, mode="sum")
        return sums.view(-1, *grad_C.shape[1:]), None


class _Collect(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x_C: torch.Tensor, cells: Cells) -> torch.Tensor:
        ctx.cells = cells
        return x_C.index_select(0, cells.first_cell_of_token)

    @staticmethod
    def backward(ctx: Any, grad_P: torch.Tensor) -> tuple[torch.Tensor, None]:
        cells: Cells = ctx.cells
        grad_C = grad_P.new_zeros((cells.num_cells, *grad_P.shape[1:]))
        return grad_C.index_copy_(0, cells.first_cell_of_token, grad_P), None


@dataclass(frozen=True, slots=True)
class Runs:
    """Consecutive tokens, run after run without padding: what a kernel of variable lengths takes."""

    cells: Cells
    offsets: torch.Tensor
    """[runs + 1] int32 where each begins (``cu_seqlens``)."""
    max_length: int


def runs_of(cells: Cells, lengths: Sequence[int], device: torch.device) -> Runs:
    """The runs of these ``lengths`` in ``cells``."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Runs(cells, torch.from_numpy(offsets).to(device), max(lengths))


class Segments:
    """The samples of a pack, in order.  Made once per micro-batch and used by every layer.

    ``token_of_position`` is the pack's token at each position of each sample, sample after sample; None when samples
    share nothing and lie end to end.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, token_of_position: Ints | None = None) -> None:
        self.lengths = tuple(int(length) for length in lengths)
        self._device = device
        self._token_of_position = np.arange(sum(self.lengths)) if token_of_position is None else token_of_position
        self._num_tokens = int(self._token_of_position.max()) + 1

    @property
    def num_rows(self) -> int:
        """Tokens that this rank computes."""
        return self._num_tokens

    def row_each(self, width: int) -> Cells:
        """[samples, width] cells: a row for every sample, with padding at its end."""
        columns, lengths = np.arange(width), np.asarray(self.lengths)[:, None]
        places = np.cumsum(self.lengths)[:, None] - lengths + columns
        padding = columns >= lengths
        token_of_cell = np.where(padding, -1, self._token_of_position[np.where(padding, 0, places)])
        return Cells(token_of_cell.ravel(), self._num_tokens, self._device)

    def short_rows(self, heads: int, key_heads: int) -> ShortRows:
        """Where each of so many heads finds its queries and keys; made once for all layers."""
        shape = (heads, key_heads)
        if shape not in self._short_rows:
            self._short_rows[shape] = ShortRows(self.lengths, self._token_of_position, *shape, self._device)
        return self._short_rows[shape]

    @cached_property
    def _short_rows(self) -> dict[tuple[int, int], ShortRows]:
        return {}

    @property
    def offsets(self) -> torch.Tensor:
        """[samples + 1] int32: where each sample begins in the ``end_to_end`` layout (``cu_seqlens``)."""
        return self.query_runs.offsets

    @cached_property
    def query_runs(self) -> Runs:
        """What attends: whole samples."""
        return runs_of(self.end_to_end, self.lengths, self._device)

    @property
    def key_runs(self) -> Runs:
        """What each of the ``query_runs`` attends to.  The last query sees the last key, the one before all but it."""
        return self.query_runs

    @cached_property
    def end_to_end(self) -> Cells:
        """Whole samples one after another, without padding."""
        return Cells(self._token_of_position, self._num_tokens, self._device)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Samples by descending length, those of similar length together."""
        buckets = []
        start = 0
        for run in self._runs:
            buckets.append(Bucket(start, len(run), self.lengths[run[0]]))
            start += buckets[-1].rows * buckets[-1].width
        return tuple(buckets)

    @cached_property
    def bucketed(self) -> Cells:
        """The cells of all buckets, bucket after bucket."""
        starts = np.cumsum(self.lengths) - self.lengths
        parts = []
        for bucket, run in zip(self.buckets, self._runs, strict=True):
            column = np.arange(bucket.width)
            lengths = np.asarray([self.lengths[i] for i in run])
            positions = starts[list(run)][:, None] + column
            padding = column >= lengths[:, None]
            parts.append(np.where(padding, -1, self._token_of_position[np.where(padding, 0, positions)]).ravel())
        return Cells(np.concatenate(parts), self._num_tokens, self._device)

    @cached_property
    def _runs(self) -> tuple[Sequence[int], ...]:
        by_length = sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i))
        return tuple(_similar(by_length, self.lengths))


def _similar(by_length: Sequence[int], lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut samples of descending length where one more would pad too much."""
    first = tokens = 0
    for at, sample in enumerate(by_length):
        width = lengths[by_length[first]]
        padded = width * (at - first + 1)
        if width > SHORT and padded > (1 + _MAX_PADDING) * (tokens + lengths[sample]):
            yield by_length[first:at]
            first, tokens = at, 0
        tokens += lengths[sample]
    yield by_length[first:]
