"""Causal attention over packs of short samples, on CPUs: a few matrix products for all of them.

A kernel made for long samples costs one of some dozen tokens more to enter than to run.  Here the scores of all samples
of similar length are one product.  Every token of the pack is a query once, so that samples that share a prompt attend
from it once: the first of them has all its tokens as queries, the others only those of their responses.

P = tokens of the pack, H = heads, K = heads of keys, G = H / K, D = size of a head; of a bucket: R = rows (samples),
Q = queries and W = keys of the longest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from miles.core.types.batch import Ints

# Longer samples gain from a kernel that skips what causality hides, and would keep too many scores.
MAX_LENGTH = 128
# Rows share a bucket until its padded area exceeds theirs by this share.
_MAX_PADDING = 0.25


@dataclass(frozen=True, slots=True)
class Row:
    """A sample: its last ``queries`` tokens attend to all that come before them."""

    start: int
    """First of its places in ``token_of_position``."""
    length: int
    queries: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows that attend in one product."""

    shape: tuple[int, int, int]
    """R, Q, W."""
    bias: torch.Tensor
    """[R, 1, Q, W]: 0 where a query may look, else -inf."""


class ShortRows:
    """Where the samples of a pack find their queries and keys, for a number of heads.  Made once per micro-batch.

    Cells are rows of D numbers: [R, K, G, Q] for queries and [R, K, W] for keys, bucket after bucket.
    """

    def __init__(
        self, lengths: Sequence[int], token_of_position: Ints, heads: int, key_heads: int, device: torch.device
    ) -> None:
        self.heads, self.key_heads = heads, key_heads
        rows = _rows(lengths, token_of_position)
        num_tokens = int(token_of_position.max()) + 1
        self.buckets: list[Bucket] = []
        queries, filled, keys = [], [], []
        for run in _similar(sorted(rows, key=lambda row: (-row.queries, -row.length, row.start))):
            table = _Table(run)
            self.buckets.append(Bucket(table.shape, torch.from_numpy(table.bias).to(device)))
            queries.append(_by_head(token_of_position[table.query_places], heads))
            filled.append(np.broadcast_to(table.filled[:, None], (len(run), heads, table.shape[1])).ravel())
            keys.append(_by_head(token_of_position[table.key_places], key_heads))
        query_index, key_index = np.concatenate(queries), np.concatenate(keys)
        own = ~np.concatenate(filled)
        cell_of_query = np.empty(num_tokens * heads, np.int64)
        cell_of_query[query_index[own]] = np.flatnonzero(own)
        order = np.argsort(key_index, kind="stable")
        starts = np.searchsorted(key_index[order], np.arange(num_tokens * key_heads))
        tables = (query_index, cell_of_query, np.flatnonzero(~own), key_index, order, starts)
        self._tensors = tuple(torch.from_numpy(table).to(device) for table in tables)
        self.query_index, self.cell_of_query, self.filling, self.key_index, self._order, self._starts = self._tensors

    def gather_keys(self, x_P: torch.Tensor) -> torch.Tensor:
        """[P, K, D] to cells."""
        return x_P.reshape(-1, x_P.shape[-1]).index_select(0, self.key_index)

    def gather_queries(self, x_P: torch.Tensor) -> torch.Tensor:
        """[P, H, D] to cells; filling repeats a token of its row."""
        return x_P.reshape(-1, x_P.shape[-1]).index_select(0, self.query_index)

    def collect_queries(self, cells: torch.Tensor) -> torch.Tensor:
        """Cells to [P, H, D]."""
        return cells.index_select(0, self.cell_of_query).view(-1, self.heads, cells.shape[-1])

    def sum_keys(self, cells: torch.Tensor) -> torch.Tensor:
        """Cells to [P, K, D], those of each token added up in a fixed order."""
        return F.embedding_bag(self._order, cells, self._starts, mode="sum").view(-1, self.key_heads, cells.shape[-1])

    def queries_of_buckets(self, cells: torch.Tensor) -> list[torch.Tensor]:
        """Each bucket's cells as [R * K, G * Q, D]."""
        groups = self.heads // self.key_heads
        return self._split(cells, [groups * bucket.shape[1] for bucket in self.buckets])

    def keys_of_buckets(self, cells: torch.Tensor) -> list[torch.Tensor]:
        """Each bucket's cells as [R * K, W, D]."""
        return self._split(cells, [bucket.shape[2] for bucket in self.buckets])

    def _split(self, cells: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
        batches = [bucket.shape[0] * self.key_heads for bucket in self.buckets]
        parts = cells.split([batch * width for batch, width in zip(batches, widths, strict=True)])
        return [part.view(batch, width, -1) for part, batch, width in zip(parts, batches, widths, strict=True)]


def attend_short(
    q_P: torch.Tensor, k_P: torch.Tensor, v_P: torch.Tensor, rows: ShortRows, scale: float | None
) -> torch.Tensor:
    """[P, H, D] of every token, each sample attending to itself alone."""
    out_P: torch.Tensor = _ShortAttention.apply(q_P, k_P, v_P, rows, q_P.shape[-1] ** -0.5 if scale is None else scale)
    return out_P


class _ShortAttention(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, q_P: torch.Tensor, k_P: torch.Tensor, v_P: torch.Tensor, rows: ShortRows, scale: float
    ) -> torch.Tensor:
        out_P, kept = attention(q_P, k_P, v_P, rows, scale)
        ctx.rows, ctx.scale = rows, scale
        ctx.save_for_backward(*kept)
        return out_P

    @staticmethod
    def backward(ctx: Any, grad_P: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *attention_gradients(grad_P, ctx.saved_tensors, ctx.rows, ctx.scale), None, None


def attention(
    q_P: torch.Tensor, k_P: torch.Tensor, v_P: torch.Tensor, rows: ShortRows, scale: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """``attend_short`` without autograd, and what its gradients need.

    The weights of attention are kept: for short samples they take no more memory than queries and keys.
    """
    q, k, v = rows.gather_queries(q_P).mul_(scale), rows.gather_keys(k_P), rows.gather_keys(v_P)
    out = q.new_empty(len(q), v.shape[-1])
    q_of, out_of = rows.queries_of_buckets(q), rows.queries_of_buckets(out)
    k_of, v_of = rows.keys_of_buckets(k), rows.keys_of_buckets(v)
    weights = []
    for b, bucket in enumerate(rows.buckets):
        scores = torch.bmm(q_of[b], k_of[b].transpose(1, 2))
        scores.view(bucket.shape[0], -1, *bucket.shape[1:]).add_(bucket.bias)
        weights.append(torch.softmax(scores, -1, out=scores))
        torch.bmm(scores, v_of[b], out=out_of[b])
    return rows.collect_queries(out), (q, k, v, out, *weights)


def attention_gradients(
    grad_P: torch.Tensor, kept: Sequence[torch.Tensor], rows: ShortRows, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of queries, keys and values, from that of the output and what ``attention`` kept."""
    q, k, v, out, *weights = kept
    grad = rows.gather_queries(grad_P).index_fill_(0, rows.filling, 0.0)
    along = torch.linalg.vecdot(grad, out).unsqueeze(-1)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    q_of, grad_of, along_of, grad_q_of = map(rows.queries_of_buckets, (q, grad, along, grad_q))
    k_of, v_of, grad_k_of, grad_v_of = map(rows.keys_of_buckets, (k, v, grad_k, grad_v))
    for b, p in enumerate(weights):
        torch.bmm(p.transpose(1, 2), grad_of[b], out=grad_v_of[b])
        grad_scores = torch.bmm(grad_of[b], v_of[b].transpose(1, 2)).sub_(along_of[b]).mul_(p)
        torch.bmm(grad_scores, k_of[b], out=grad_q_of[b])
        torch.bmm(grad_scores.transpose(1, 2), q_of[b], out=grad_k_of[b])
    return rows.collect_queries(grad_q).mul_(scale), rows.sum_keys(grad_k), rows.sum_keys(grad_v)


class _Table:
    """Places of a bucket's queries and keys."""

    def __init__(self, run: Sequence[Row]) -> None:
        self.shape = (len(run), run[0].queries, max(row.length for row in run))
        start, length, queries = np.asarray([(row.start, row.length, row.queries) for row in run]).T[:, :, None]
        column = np.arange(self.shape[1])
        position = np.minimum(length - queries + column, length - 1)
        key = np.arange(self.shape[2])
        self.filled = column >= queries
        """[R, Q]: True where a row has no query of its own, and repeats its last one."""
        self.query_places = start + position
        self.key_places = start + np.minimum(key, length - 1)
        visible = key <= position[:, :, None]
        self.bias = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None]


def _rows(lengths: Sequence[int], token_of_position: Ints) -> list[Row]:
    """A token is a query of the first sample that has it."""
    ends = np.cumsum(lengths)
    first = np.zeros(len(token_of_position), np.int64)
    first[np.unique(token_of_position, return_index=True)[1]] = 1
    counts = np.diff(np.concatenate([[0], np.cumsum(first)])[np.concatenate([[0], ends])])
    return [
        Row(int(end) - length, length, int(count))
        for end, length, count in zip(ends, lengths, counts, strict=True)
        if count
    ]


def _similar(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Cut rows of descending queries where one more would pad too much."""
    first = area = width = 0
    for at, row in enumerate(rows):
        width = max(width, row.length)
        own = row.queries * row.length
        if rows[first].queries * width * (at - first + 1) > (1 + _MAX_PADDING) * (area + own):
            yield rows[first:at]
            first, area, width = at, 0, row.length
        area += own
    yield rows[first:]


def _by_head(tokens: Ints, heads: int) -> Ints:
    """[R, X] tokens to the rows of [P, heads, D] that hold them: [R * heads * X]."""
    return (tokens[:, None] * heads + np.arange(heads)[:, None]).ravel()
