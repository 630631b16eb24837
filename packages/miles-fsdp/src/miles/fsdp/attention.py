"""Causal attention over packed samples, registered with transformers under names of ours.

Linear layers see one row of tokens; only attention looks at the borders of samples.  No mask over the whole pack is
ever made: the SDPA kernel runs once per bucket of similar lengths, the variable-length kernel once per pack.
Dropout is ignored: a policy's log-probabilities are a function of its weights.

P = tokens of the pack, C = cells (one per token of each sample, see ``Segments``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from miles.core.errors import TrainingError
from miles.core.training.bucket_attention import BucketKernel, attend_by_buckets, gathered_keys, sdpa_bucket
from miles.core.training.context import ContextSegments
from miles.core.training.segments import Segments

# transformers takes a name with "sdpa" or "flash" in it for its own kernels, and asks the model whether it knows them.
SDPA = "miles_packed_batched"
EAGER = "miles_packed_eager"
VARLEN = "miles_packed_varlen"


_KERNELS = {"sdpa": SDPA, "eager": EAGER, "flash_attention_2": VARLEN}


def kernel_name(attn_implementation: str, *, packed: bool = True) -> str:
    """Name under which transformers finds the packed form of an ``--attn-implementation``, or its own form."""
    return _KERNELS[attn_implementation] if packed else attn_implementation


def _eager_bucket(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


_BUCKET_KERNELS: dict[str, BucketKernel] = {SDPA: sdpa_bucket, EAGER: _eager_bucket, VARLEN: sdpa_bucket}


def _by_varlen_kernel(
    q_P: torch.Tensor,
    k_P: torch.Tensor,
    v_P: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    if isinstance(segments, ContextSegments):
        k_P, v_P = gathered_keys(k_P, v_P, segments)
    queries, keys = segments.query_runs, segments.key_runs
    out_C = varlen_attn(
        queries.cells.spread(q_P),
        keys.cells.spread(k_P),
        keys.cells.spread(v_P),
        queries.offsets,
        keys.offsets,
        queries.max_length,
        keys.max_length,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_P.shape[1] != k_P.shape[1],
    )
    return queries.cells.collect(out_C)


# What some models ask of their attention and no packed kernel here computes.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def _interface(kernel: str) -> Callable[..., tuple[torch.Tensor, None]]:
    """A function of transformers' attention interface that runs ``kernel``; q, k, v are [1, heads, pack, dim]."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        segments: Segments | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        segments = _checked(module, segments, kwargs)
        q, k, v = (x[0].transpose(0, 1)[: segments.num_rows] for x in (query, key, value))
        # A model is loaded, tried and proved in host memory, where the variable-length kernel does not run.
        if kernel == VARLEN and q.device.type != "cpu":
            out = _by_varlen_kernel(q, k, v, segments, scaling, sliding_window)
        else:
            out = attend_by_buckets(_BUCKET_KERNELS[kernel], q, k, v, segments, scaling, sliding_window)
        filling = query.shape[2] - len(out)
        return functional.pad(out, (0, 0, 0, 0, 0, filling))[None] if filling else out[None], None

    return attend


def _checked(module: torch.nn.Module, segments: Segments | None, kwargs: dict[str, Any]) -> Segments:
    if segments is None:
        raise TrainingError(
            f"{type(module).__name__} does not hand the arguments of attention on, so that packed samples cannot be "
            "told apart; the fsdp backend cannot train this model"
        )
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked or kwargs.get("is_causal") is False:
        raise TrainingError(
            f"{type(module).__name__} asks for attention with {', '.join(asked) or 'no causal order'}, "
            "which packed attention does not compute; the fsdp backend cannot train this model"
        )
    return segments


for _kernel in (SDPA, EAGER, VARLEN):
    AttentionInterface.register(_kernel, _interface(_kernel))
