"""Attention over slots, the same for every model, and the layout of one forward pass.

A forward pass computes a flat list of rows: first the decoding sequences, one row each, then blocks of prompts.  Rows
that must be computed for the shape alone are at the end.  Every row's result has the same bits whatever rows are
computed with it, and a token's row is the same whether it is decoded or part of a prompt:

- the number of rows is a multiple of 4 or more, so matrix products never take the kernels for very few rows;
- attention multiplies the same number of queries at a time: the heads of a group, or as many queries of a prompt;
- keys are read in multiples of 32, and what is masked adds exact zeros to a sum;
- sums over more than SPAN keys are made span by span, since matrix libraries cut long sums where it suits the length.

Attention computes in float32 whatever the model's precision: its cost is reading keys and values, and small products
of other precisions are converted on the way.

M = rows, N = sequences of a segment, Q = rows of one sequence, H = heads, K = key-value heads, G = H / K,
D = head dimension, R = queries multiplied at a time, C = such portions of a key-value head, T = tokens read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from miles.rollout.engines.embedded.kv import Pool
from miles.rollout.engines.embedded.products import Floats, multiply

Ints = npt.NDArray[np.int64]
ROW_MULTIPLE = 16
"""Rows that suit every operation; a model may do with fewer (see Model)."""
QUERY_MULTIPLE = 8
"""A block of a prompt is a multiple of this many rows."""
SPAN = 128
"""No library cuts a sum this short."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sight:
    """Which tokens the queries of a segment see in a layer."""

    start: int
    """Tokens before are seen by none; a multiple of SPAN."""
    mask: torch.Tensor
    """0 or -inf, [N, 1, 1, T - start] when Q = 1, else [Q, T - start]"""


@dataclass(slots=True, eq=False)
class Segment:
    """``count`` sequences in neighbouring slots of a pool that each compute ``num_queries`` rows."""

    pool: Pool[Any]
    first_slot: int
    num_tokens: int
    """T."""
    first_row: int
    positions: Ints
    """[N, Q]; the same for all sequences when Q > 1, and Q is then a multiple of QUERY_MULTIPLE."""
    _sights: dict[int | None, _Sight] = field(default_factory=dict)
    _rooms: dict[tuple[str | int, ...], Floats] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """N."""
        return int(self.positions.shape[0])

    @property
    def num_queries(self) -> int:
        """Q."""
        return int(self.positions.shape[1])

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.positions.size)

    @property
    def slots(self) -> slice:
        return slice(self.first_slot, self.first_slot + self.count)

    def sight(self, window: int | None) -> _Sight:
        """What is seen; ``window`` is how far back a sliding layer sees, itself included."""
        found = self._sights.get(window)
        if found is None:
            positions = self.positions[:, None] if self.num_queries == 1 else self.positions[0]
            found = self._sights[window] = _sight(positions, self.num_tokens, window)
        return found

    def room(self, name: str, *size: int) -> Floats:
        """Memory that all layers of the same sight use, zero at first."""
        room = self._rooms.get((name, *size))
        if room is None:
            room = self._rooms[name, *size] = np.zeros(size, np.float32)
        return room


@dataclass(slots=True, eq=False)
class Plan:
    """One forward pass."""

    tokens: torch.Tensor
    """[M] token ids; M is a multiple of the model's ``row_multiple``."""
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
    asked, new_keys, new_values = (rows.float().numpy() for rows in (queries, keys, values))
    for segment in plan.segments:
        rows = segment.rows
        segment.pool.write(layer, segment.slots, segment.positions, new_keys[rows], new_values[rows])
        held = segment.pool.read(layer, segment.slots, segment.num_tokens)
        sight = segment.sight(window)
        if segment.num_queries == 1:
            _decode(segment, asked[rows], *held, sight, out[rows], scale, softcap)
        else:
            _compute_blocks(segment, asked[rows], *held, sight, out[rows], scale, softcap)


def _decode(
    segment: Segment,
    queries: Floats,
    keys: Floats,
    values: Floats,
    sight: _Sight,
    out: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Attention of one query [N, H, D] per sequence; the heads that share keys are multiplied together."""
    count, num_heads, dim = queries.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    portion = portion_size(group)
    filled = -(-group // portion) * portion
    room = segment.room("queries", count, num_kv_heads, filled, dim)
    np.multiply(queries.reshape(count, num_kv_heads, group, dim), np.float32(scale), out=room[:, :, :group])
    portions = room.reshape(count, num_kv_heads, -1, portion, dim)
    scores = segment.room("scores", *portions.shape[:-1], segment.num_tokens - sight.start)
    result = segment.room("result", *portions.shape[:-1], values.shape[3])
    _score(portions, keys[:, :, sight.start :], scores)
    _weigh(torch.from_numpy(scores).view(count, num_kv_heads, filled, -1), sight.mask, softcap)
    _mix(scores, values[:, :, sight.start :], result)
    heads = torch.from_numpy(result).view(count, num_kv_heads, filled, -1)[:, :, :group]
    out.view(count, num_kv_heads, group, -1).copy_(heads)


def _compute_blocks(
    segment: Segment,
    queries: Floats,
    keys: Floats,
    values: Floats,
    sight: _Sight,
    out: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Attention of Q queries [N x Q, H, D] per sequence; one key-value head at a time bounds the memory for scores."""
    count, num_queries, num_kv_heads = segment.count, segment.num_queries, keys.shape[1]
    num_heads, dim = queries.shape[1:]
    group = num_heads // num_kv_heads
    portion = portion_size(group)
    asked = queries.reshape(count, num_queries, num_kv_heads, group, dim)
    places = out.view(count, num_queries, num_kv_heads, group, -1)
    room = segment.room("queries", count, group, num_queries, dim)
    portions = room.reshape(count, 1, -1, portion, dim)
    scores = segment.room("scores", *portions.shape[:-1], segment.num_tokens - sight.start)
    result = segment.room("result", *portions.shape[:-1], values.shape[3])
    for head in range(num_kv_heads):
        np.multiply(asked[:, :, head].transpose(0, 2, 1, 3), np.float32(scale), out=room)
        _score(portions, keys[:, head : head + 1, sight.start :], scores)
        _weigh(torch.from_numpy(scores).view(count, group, num_queries, -1), sight.mask, softcap)
        _mix(scores, values[:, head : head + 1, sight.start :], result)
        heads = torch.from_numpy(result).view(count, group, num_queries, -1)
        places[:, :, head].copy_(heads.transpose(1, 2))


def portion_size(group: int) -> int:
    """R, of a model whose key-value heads serve ``group`` heads each; divides QUERY_MULTIPLE."""
    return 2 if group <= 2 else 4 if group <= 4 else QUERY_MULTIPLE


def _score(queries: Floats, keys: Floats, scores: Floats) -> None:
    """``scores`` [N, K, C, R, T] of ``queries`` [N, K, C, R, D] and ``keys`` [N, K, T, D]."""
    for start in range(0, keys.shape[2], SPAN):
        span = keys[:, :, None, start : start + SPAN].swapaxes(3, 4)
        multiply(queries, span, scores[..., start : start + SPAN])


def _weigh(scores: torch.Tensor, mask: torch.Tensor, softcap: float | None) -> None:
    """Turn ``scores`` [..., T] into weights."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    torch.softmax(scores.add_(mask), -1, out=scores)


def _mix(weights: Floats, values: Floats, result: Floats) -> None:
    """``result`` [N, K, C, R, D]: ``values`` [N, K, T, D] by ``weights`` [N, K, C, R, T]; spans are added in order."""
    multiply(weights[..., :SPAN], values[:, :, None, :SPAN], result)
    if values.shape[2] > SPAN:
        part = np.empty_like(result)
        for start in range(SPAN, values.shape[2], SPAN):
            multiply(weights[..., start : start + SPAN], values[:, :, None, start : start + SPAN], part)
            result += part


def _sight(positions: Ints, num_tokens: int, window: int | None) -> _Sight:
    """What queries at ``positions`` [...] see of T tokens; the mask is [..., T - start]."""
    start = 0 if window is None else max(int(positions.min()) - window + 1, 0) // SPAN * SPAN
    tokens = np.arange(start, num_tokens)
    hidden = tokens > positions[..., None]
    if window is not None:
        hidden |= tokens <= positions[..., None] - window
    return _Sight(start, torch.from_numpy(np.where(hidden, np.float32("-inf"), np.float32(0))))
