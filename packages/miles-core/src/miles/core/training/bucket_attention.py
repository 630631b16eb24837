"""Causal attention over packed samples, one batched call per bucket of similar lengths.

P = tokens of the pack on this rank, C = cells (one per token of each sample, see ``Segments`` and ``ContextSegments``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from miles.core.training.context import ContextSegments
from miles.core.training.segments import Segments
from miles.core.training.short_attention import MAX_LENGTH, attend_short

BucketKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float | None, torch.Tensor | None],
    torch.Tensor,
]
"""``(q, k, v, scale, mask)`` of one bucket, [rows, heads, width, dim], to its output in the shape of ``q``.

``mask`` broadcasts to [rows, heads, queries, keys] and is True where a query may look; None: the causal triangle.
"""


def attend_by_buckets(
    attend: BucketKernel,
    q_P: torch.Tensor,
    k_P: torch.Tensor,
    v_P: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """[P, heads, dim] of every token, each sample attending to itself alone.  Collective when ranks share samples."""
    if attend is sdpa_bucket and are_short(q_P, segments, window):
        return attend_short(q_P, k_P, v_P, segments.short_rows(q_P.shape[1], k_P.shape[1]), scale)
    if isinstance(segments, ContextSegments):
        k_P, v_P = gathered_keys(k_P, v_P, segments)
        queries, buckets = segments.query_cells, _shared_buckets(q_P, k_P, v_P, segments, window)
    else:
        queries, buckets = segments.bucketed, _whole_buckets(q_P, k_P, v_P, segments, window)
    parts = []
    for q, k, v, mask in buckets:
        out = attend(q, k, v, scale, mask)
        parts.append(out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[3]))
    return queries.collect(parts[0] if len(parts) == 1 else torch.cat(parts))


def are_short(q_P: torch.Tensor, segments: Segments, window: int | None) -> bool:
    """Whether plain products serve the pack better than a kernel."""
    longest = max(segments.lengths)
    if isinstance(segments, ContextSegments) or longest > MAX_LENGTH or (window is not None and window < longest):
        return False
    return q_P.device.type == "cpu" and q_P.dtype in (torch.float32, torch.float64)


def gathered_keys(k_P: torch.Tensor, v_P: torch.Tensor, segments: ContextSegments) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all ranks, in one exchange."""
    both = segments.group.gather(torch.cat((k_P, v_P), dim=-1))
    return both[..., : k_P.shape[-1]], both[..., k_P.shape[-1] :]


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Queries, keys, values and mask of one bucket."""


def _whole_buckets(
    q_P: torch.Tensor, k_P: torch.Tensor, v_P: torch.Tensor, segments: Segments, window: int | None
) -> Iterator[Operands]:
    q_C, k_C, v_C = (segments.bucketed.spread(x_P) for x_P in (q_P, k_P, v_P))
    for bucket in segments.buckets:
        q, k, v = (_rows(x_C, bucket.start, bucket.rows, bucket.width) for x_C in (q_C, k_C, v_C))
        yield q, k, v, window_mask(bucket.width, window, q.device)


def _shared_buckets(
    q_P: torch.Tensor, k_P: torch.Tensor, v_P: torch.Tensor, segments: ContextSegments, window: int | None
) -> Iterator[Operands]:
    q_C, k_C, v_C = (
        segments.query_cells.spread(q_P),
        segments.key_cells.spread(k_P),
        segments.key_cells.spread(v_P),
    )
    for bucket, mask in zip(segments.row_buckets, segments.masks(window), strict=True):
        q = _rows(q_C, bucket.query_start, bucket.rows, bucket.query_width)
        k, v = (_rows(x_C, bucket.key_start, bucket.rows, bucket.key_width) for x_C in (k_C, v_C))
        yield q, k, v, mask


def _rows(x_C: torch.Tensor, start: int, rows: int, width: int) -> torch.Tensor:
    """[cells, heads, dim] -> [rows, heads, width, dim]."""
    return x_C[start : start + rows * width].view(rows, width, *x_C.shape[1:]).transpose(1, 2)


def sdpa_bucket(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def window_mask(width: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[width, width] of the causal band when a sliding window cuts into it; None when plain causality says it all."""
    if window is None or window >= width:
        return None
    distance = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)
    return (distance >= 0) & (distance < window)
