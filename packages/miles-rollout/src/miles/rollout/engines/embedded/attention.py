"""Attention over slots, the same for every model, and the layout of one forward pass.

A forward pass computes a flat list of rows: first the decoding sequences, one row each, then blocks of prompts.  Rows
that must be computed for the shape alone are at the end.  Every row's result has the same bits whatever rows are
computed with it, and a token's row is the same whether it is decoded or part of a prompt:

- the number of rows is a multiple of 16, so matrix products never take the kernels for very few rows;
- a query head group has at least four rows, for the same reason;
- keys are read in multiples of 32, and what is masked adds exact zeros at the end of a sum;
- sums over more than SPAN keys are made span by span, since matrix libraries cut long sums where it suits the length.

M = rows, N = sequences of a segment, Q = rows of one sequence, H = heads, K = key-value heads, D = head dimension,
T = tokens read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from miles.rollout.engines.embedded.kv import Pool

ROW_MULTIPLE = 16
MIN_QUERY_ROWS = 4
SPAN = 128
"""No library cuts a sum this short."""

_MOST_JOINT_HEADS, _LARGEST_JOINT_DIM = 4, 32
"""Up to here one product over all key-value heads is faster than one for each, though most of it is zeros."""

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Returns the result and the logarithm of the sum of exponentials, which ``scaled_dot_product_attention`` keeps."""


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Which tokens of a span the queries of a segment see."""

    start: int
    stop: int
    mask: torch.Tensor
    """[N or 1, 1, Q, stop - start], 0 or -inf; a query that sees nothing sees everything here."""
    unseeing: torch.Tensor | None
    """[N or 1, 1, Q] queries that see nothing; None when all see something."""


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
    _spans: dict[int | None, list[Span]] = field(default_factory=dict)
    _room: torch.Tensor | None = None

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.count * self.num_queries)

    def spans(self, window: int | None, dtype: torch.dtype) -> list[Span]:
        """The spans to read; ``window`` is how far back a sliding layer sees, itself included."""
        spans = self._spans.get(window)
        if spans is None:
            positions = self.positions if self.num_queries == 1 else self.positions[:1]
            spans = self._spans[window] = list(_spans(positions, self.num_tokens, window, dtype))
        return spans

    def zeros(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that is zero at first and the same in every layer."""
        if self._room is None:
            self._room = torch.zeros(*size, dtype=dtype)
        return self._room


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
    num_heads, num_kv_heads = queries.shape[1], keys.shape[1]
    group = num_heads // num_kv_heads
    joint = (
        softcap is None and values.shape[2] == keys.shape[2] and _worth_joining(num_heads, num_kv_heads, keys.shape[2])
    )
    for segment in plan.segments:
        rows, count = segment.rows, segment.count
        segment.pool.write(layer, segment.index, keys[rows], values[rows])
        held = segment.pool.read(layer, segment.first_slot, count, segment.num_tokens)
        spans = segment.spans(window, queries.dtype)
        if segment.num_queries > 1:
            stacked = queries[rows].view(count, segment.num_queries, num_heads, -1).transpose(1, 2)
            result = _over_spans(stacked, *held, spans, scale, softcap)
            out[rows].view(count, segment.num_queries, num_heads, -1).copy_(result.transpose(1, 2))
        elif joint:
            wide = segment.zeros(count, num_kv_heads, group, num_kv_heads, queries.shape[2], dtype=queries.dtype)
            result = _over_spans(_spread(queries[rows], wide), *_joined(*held), spans, scale, softcap)
            blocks = result.view(wide.shape).diagonal(dim1=1, dim2=3)
            out[rows].view(count, num_kv_heads, group, -1).copy_(blocks.permute(0, 3, 1, 2))
        else:  # the heads that share keys are the rows of the product
            grouped = _grouped(queries[rows], num_kv_heads, group)
            result = _over_spans(grouped, *held, spans, scale, softcap)
            out[rows].view(count, num_kv_heads, group, -1).copy_(result[:, :, :group])


def _over_spans(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: list[Span],
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of ``queries`` [N, H, Q, D] to ``keys`` and ``values`` [N, K, T, D].

    Spans are joined by their sums of exponentials, first to last; one that a query does not see has the weight 0.
    """
    parts, log_sums = [], []
    for span in spans:
        tokens = slice(span.start, span.stop)
        part, log_sum = _over_span(queries, keys[:, :, tokens], values[:, :, tokens], span.mask, scale, softcap)
        if span.unseeing is not None:
            log_sum = log_sum.masked_fill(span.unseeing, float("-inf"))
        parts.append(part)
        log_sums.append(log_sum)
    if len(parts) == 1:
        return parts[0]
    stacked = torch.stack(log_sums)
    weights = (stacked - stacked.amax(0)).exp_()
    total = weights[0].clone()
    for weight in weights[1:]:
        total += weight
    weights /= total
    result = parts[0] * weights[0, ..., None]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        result.addcmul_(part, weight[..., None])
    return result.to(queries.dtype)


def _over_span(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [N, H, Q, D] within one span, and the logarithm [N, H, Q] of its sum of exponentials."""
    if softcap is None and keys.shape[3] == values.shape[3]:
        part, log_sum = _flash_attention(queries, keys, values, 0.0, False, attn_mask=mask, scale=scale)
        return part, log_sum
    count, num_heads, num_queries, dim = queries.shape
    rows = queries.reshape(count, keys.shape[1], -1, dim)
    scores = torch.matmul(rows, keys.transpose(2, 3)).view(count, num_heads, num_queries, -1).float()
    scores.mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    weights = scores.add_(mask).softmax(-1)
    log_sum = scores.amax(-1) - weights.amax(-1).log_()  # the largest weight is 1 over the sum
    weights = weights.to(values.dtype).view(count, keys.shape[1], rows.shape[2], -1)
    return torch.matmul(weights, values).view(count, num_heads, num_queries, -1), log_sum


def _worth_joining(num_heads: int, num_kv_heads: int, dim: int) -> bool:
    return num_heads >= MIN_QUERY_ROWS and 1 < num_kv_heads <= _MOST_JOINT_HEADS and dim <= _LARGEST_JOINT_DIM


def _spread(queries: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """``queries`` [N, H, D] as [N, 1, H, K x D]: each in the columns of its own keys, zeros in those of the others.

    A product with the keys of all heads side by side adds exact zeros to what each head gives alone.
    ``wide`` [N, K, G, K, D] is zero outside of these columns.
    """
    count, num_kv_heads, group, _, dim = wide.shape
    own = queries.view(count, num_kv_heads, group, dim)
    wide.diagonal(dim1=1, dim2=3).copy_(own.permute(0, 2, 3, 1))
    return wide.view(count, 1, num_kv_heads * group, num_kv_heads * dim)


def _joined(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [N, K, T, D] as [N, 1, T, K x D], which is how they are stored."""
    return keys.transpose(1, 2).flatten(2)[:, None], values.transpose(1, 2).flatten(2)[:, None]


def _grouped(queries: torch.Tensor, num_kv_heads: int, group: int) -> torch.Tensor:
    """``queries`` [N, H, D] as [N, K, R, D]; only the first ``group`` of the R >= MIN_QUERY_ROWS rows are meant.

    Where memory goes on behind the queries the other rows are whatever lies there, without a copy.
    """
    count, _, dim = queries.shape
    if group >= MIN_QUERY_ROWS:
        return queries.view(count, num_kv_heads, group, dim)
    row, head, element = queries.stride()
    last_head = (num_kv_heads - 1) * group + MIN_QUERY_ROWS - 1
    end = queries.storage_offset() + (count - 1) * row + last_head * head + (dim - 1) * element
    if end < queries.untyped_storage().nbytes() // queries.element_size():
        return queries.as_strided((count, num_kv_heads, MIN_QUERY_ROWS, dim), (row, group * head, head, element))
    padded = queries.new_zeros(count, num_kv_heads, MIN_QUERY_ROWS, dim)
    padded[:, :, :group] = queries.view(count, num_kv_heads, group, dim)
    return padded


def _spans(positions: torch.Tensor, num_tokens: int, window: int | None, dtype: torch.dtype) -> Iterator[Span]:
    """The spans of T tokens that anyone at ``positions`` [N, Q] sees."""
    for start in range(0, num_tokens, SPAN):
        stop = min(start + SPAN, num_tokens)
        token = torch.arange(start, stop)
        hidden = token > positions[:, None, :, None]
        if window is not None:
            hidden |= token <= positions[:, None, :, None] - window
        unseeing = hidden.all(-1)
        if unseeing.all():
            continue
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden & ~unseeing[..., None], float("-inf"))
        yield Span(start, stop, mask, unseeing if unseeing.any() else None)
