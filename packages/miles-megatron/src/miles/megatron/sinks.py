"""Attention that may look away: each head has a logit of its own beside those of the keys, and no value behind it.

H = query heads, G = key heads, W = queries of a row, K = keys of a row.
"""

from __future__ import annotations

import torch

from miles.core.training.bucket_attention import BucketKernel, sdpa_bucket


def sink_bucket(sinks_H: torch.Tensor) -> BucketKernel:
    """A kernel over buckets in which head h has the sink ``sinks_H[h]``."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The sink is one more key: it alone has a 1 in one more dimension, where the queries have the head's logit."""
        rows, _, queries, dim = q.shape
        scale = dim**-0.5 if scale is None else scale
        logits = (sinks_H / scale).to(q.dtype).view(1, -1, 1, 1).expand(rows, -1, queries, 1)
        sink = k.new_zeros(rows, k.shape[1], 1, dim + 1)
        sink[..., -1] = 1.0
        keys = torch.cat([torch.nn.functional.pad(k, (0, 1)), sink], 2)
        values = torch.nn.functional.pad(v, (0, 0, 0, 1))
        return sdpa_bucket(torch.cat([q, logits], -1), keys, values, scale, _with_sink(mask, q, k))

    return attend


def _with_sink(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``mask``, or the causal triangle, [..., W, K], with a column for the sink that everyone sees."""
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return torch.cat([mask, mask.new_ones(*mask.shape[:-1], 1)], -1)
