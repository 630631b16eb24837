"""Attention over slots, the same for every model, and the layout of one forward pass.

A forward pass computes a flat list of rows: first the decoding sequences, one row each, then blocks of prompts.  Rows
that must be computed for the shape alone are at the end.  Every row's result has the same bits whatever rows are
computed with it:

- the number of rows is a multiple of 16, so matrix products never take the kernels for very few rows;
- a query head group has at least four rows, for the same reason;
- keys are read in multiples of 32 and what is masked adds exact zeros at the end of each sum.

tests/engines/embedded/test_invariance.py checks this on the machine at hand.

M = rows, N = sequences of a segment, Q = rows of one sequence, H = heads, K = key-value heads, D = head dimension,
T = tokens read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from miles.rollout.engines.embedded.kv import Pool

ROW_MULTIPLE = 16
MIN_QUERY_ROWS = 4


@dataclass(slots=True, eq=False)
class Segment:
    """``count`` sequences in neighbouring slots of a pool that each compute ``num_queries`` rows."""

    pool: Pool[Any]
    first_slot: int
    count: int
    num_queries: int
    first_row: int
    index: torch.Tensor
    """[N x Q] where keys and values go: slot x capacity + position."""
    positions: torch.Tensor
    """[N, Q]; the same for all sequences when Q > 1."""
    num_tokens: int
    """T."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.count * self.num_queries)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [N or 1, 1, Q, T]; ``window`` is how far back a sliding layer sees, itself included."""
        mask = self.masks.get(window)
        if mask is None:
            positions = self.positions if self.num_queries == 1 else self.positions[:1]
            mask = self.masks[window] = _mask(positions, self.num_tokens, window, dtype)
        return mask


@dataclass(slots=True, eq=False)
class Plan:
    """One forward pass."""

    tokens: torch.Tensor
    """[M] token ids; M is a multiple of ROW_MULTIPLE."""
    positions: torch.Tensor
    """[M]"""
    segments: list[Segment]


def attend(
    plan: Plan,
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Store ``keys`` and ``values`` [M, K, D] of the rows, and write each query's [M, H, D] attention to ``out``.

    ``window`` is how far back a sliding layer sees; ``softcap`` bounds the scores (arXiv:2408.00118).
    """
    for segment in plan.segments:
        rows = segment.rows
        segment.pool.write(layer, segment.index, keys[rows], values[rows])
        held = segment.pool.read(layer, segment.first_slot, segment.count, segment.num_tokens)
        mask = segment.mask(window, queries.dtype)
        if segment.num_queries == 1:
            _decode(queries[rows], *held, mask, out[rows], scale, softcap)
        else:
            _prefill(queries[rows], *held, mask, out[rows], scale, softcap)


def _decode(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """One query [N, H, D] per sequence: the heads that share keys are the rows of the product."""
    count, num_heads, dim = queries.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    if group < MIN_QUERY_ROWS:
        grouped = _with_more_rows(queries, num_kv_heads, group)
    else:
        grouped = queries.view(count, num_kv_heads, group, dim)
    result = _weighted(grouped, keys, values, mask, scale, softcap)
    out.view(count, num_kv_heads, group, -1).copy_(result[:, :, :group])


def _with_more_rows(queries: torch.Tensor, num_kv_heads: int, group: int) -> torch.Tensor:
    """``queries`` [N, H, D] as [N, K, MIN_QUERY_ROWS, D]; only the first ``group`` rows are meant.

    Where memory goes on behind the queries the other rows are whatever lies there, without a copy.
    """
    count, _, dim = queries.shape
    row, head, element = queries.stride()
    last_head = (num_kv_heads - 1) * group + MIN_QUERY_ROWS - 1
    end = queries.storage_offset() + (count - 1) * row + last_head * head + (dim - 1) * element
    if end < queries.untyped_storage().nbytes() // queries.element_size():
        return queries.as_strided((count, num_kv_heads, MIN_QUERY_ROWS, dim), (row, group * head, head, element))
    padded = queries.new_zeros(count, num_kv_heads, MIN_QUERY_ROWS, dim)
    padded[:, :, :group] = queries.view(count, num_kv_heads, group, dim)
    return padded


def _prefill(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Q queries [N x Q, H, D] per sequence."""
    count = keys.shape[0]
    num_rows, num_heads, dim = queries.shape
    stacked = queries.view(count, num_rows // count, num_heads, dim).transpose(1, 2)
    result = _weighted(stacked, keys, values, mask, scale, softcap)
    out.view(count, num_rows // count, num_heads, -1).copy_(result.transpose(1, 2))


def _weighted(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of ``queries`` [N, H, Q, D] to ``keys`` and ``values`` [N, K, T, D], where K divides H."""
    grouped = queries.shape[1] != keys.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
    count, num_heads, num_queries, _ = queries.shape
    rows = queries.reshape(count, keys.shape[1], -1, queries.shape[3])
    scores = torch.matmul(rows, keys.transpose(2, 3)).view(count, num_heads, num_queries, -1)
    scores.mul_(scale / softcap).tanh_().mul_(softcap).add_(mask)
    weights = scores.softmax(-1).view(count, keys.shape[1], rows.shape[2], -1)
    return torch.matmul(weights, values).view(count, num_heads, num_queries, -1)


def _mask(positions: torch.Tensor, num_tokens: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[N, Q] -> [N, 1, Q, T]: 0 where a token is seen, -inf elsewhere."""
    token = torch.arange(num_tokens)
    position = positions[:, None, :, None]
    hidden = token > position
    if window is not None:
        hidden |= token <= position - window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
