"""Causal attention over packed samples, one batched call per bucket of similar lengths.

P = tokens of the pack, C = cells (one per token of each sample, see ``Segments``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from miles.core.training.segments import Bucket, Segments

BucketKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None, int | None], torch.Tensor]
"""``(q, k, v, scale, window)`` of one bucket, [rows, heads, width, dim], to its output in the same shape."""


def attend_by_buckets(
    attend: BucketKernel,
    q_P: torch.Tensor,
    k_P: torch.Tensor,
    v_P: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """[P, heads, dim] of every token, each sample attending to itself alone."""
    cells = segments.bucketed
    q_C, k_C, v_C = cells.spread(q_P), cells.spread(k_P), cells.spread(v_P)
    parts = []
    for bucket in segments.buckets:
        out = attend(_rows(q_C, bucket), _rows(k_C, bucket), _rows(v_C, bucket), scale, window)
        parts.append(out.transpose(1, 2).reshape(bucket.rows * bucket.width, out.shape[1], out.shape[3]))
    return cells.collect(parts[0] if len(parts) == 1 else torch.cat(parts))


def _rows(x_C: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """[cells, heads, dim] -> [rows, heads, width, dim]."""
    cells = x_C[bucket.start : bucket.start + bucket.rows * bucket.width]
    return cells.view(bucket.rows, bucket.width, *x_C.shape[1:]).transpose(1, 2)


def sdpa_bucket(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None
) -> torch.Tensor:
    mask = window_mask(q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def window_mask(width: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[width, width] of the causal band when a sliding window cuts into it; None when plain causality says it all."""
    if window is None or window >= width:
        return None
    distance = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)
    return (distance >= 0) & (distance < window)
