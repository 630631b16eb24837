# mypy: disable-error-code="import-not-found,misc"
"""SGLang's ``torch_native`` attention for a whole batch at once; its own loops over the requests in Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention


def install() -> None:
    """Serve ``--attention-backend torch_native``."""
    ATTENTION_BACKENDS["torch_native"] = BatchedAttention


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the keys of a batch lie.  B requests, L keys of the longest, Q queries of the longest."""

    slots: torch.Tensor
    """[B * L] places in the key and value cache; of padding: any."""
    bias: torch.Tensor
    """[B, 1, Q, L], 0 where a query sees a key, else -inf."""
    queries: torch.Tensor | None
    """[B, Q], true where there is a query; None when every request has exactly one (decoding)."""

    @property
    def shape(self) -> tuple[int, int]:
        """B, L."""
        return self.bias.shape[0], self.bias.shape[-1]


class BatchedAttention(TorchNativeAttnBackend):
    """Pads to the longest request; plain causal attention only, anything else goes SGLang's own way."""

    _layout: Layout | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        special = forward_batch.encoder_lens is not None or self.use_sliding_window_kv_pool
        self._layout = None if special else _layout(forward_batch, self.req_to_token_pool.req_to_token)

    def _run_sdpa_forward_decode(
        self, query: torch.Tensor, output: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *rest: Any,
        scaling: float | None = None, sliding_window_size: int | None = None, **named: Any,
    ) -> torch.Tensor:  # fmt: skip
        layout = self._layout
        if layout is None or layout.queries is not None or sliding_window_size is not None:
            named |= {"scaling": scaling, "sliding_window_size": sliding_window_size}
            own: torch.Tensor = super()._run_sdpa_forward_decode(query, output, k_cache, v_cache, *rest, **named)
            return own
        num_requests, heads, size = query.shape
        kv_heads = k_cache.shape[1]
        keys, values = _gather(k_cache, layout, query.dtype), _gather(v_cache, layout, query.dtype)
        # The heads that share a key are queries of one: nothing is repeated.
        grouped = query.view(num_requests, kv_heads, heads // kv_heads, size)
        bias = layout.bias.to(query.dtype)
        made = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scaling)
        return output.copy_(made.reshape(num_requests, heads, -1))

    def _run_sdpa_forward_extend(
        self, query: torch.Tensor, output: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *rest: Any,
        scaling: float | None = None, causal: bool = False, sliding_window_size: int | None = None, **named: Any,
    ) -> torch.Tensor:  # fmt: skip
        layout = self._layout
        if layout is None or layout.queries is None or not causal or sliding_window_size is not None:
            named |= {"scaling": scaling, "causal": causal, "sliding_window_size": sliding_window_size}
            own: torch.Tensor = super()._run_sdpa_forward_extend(query, output, k_cache, v_cache, *rest, **named)
            return own
        present = layout.queries
        count = int(present.sum())
        padded = query.new_zeros(*present.shape, *query.shape[1:])
        padded[present] = query[:count]
        shared = query.shape[1] // k_cache.shape[1]
        keys = _gather(k_cache, layout, query.dtype).repeat_interleave(shared, 1)
        values = _gather(v_cache, layout, query.dtype).repeat_interleave(shared, 1)
        bias = layout.bias.to(query.dtype)
        made = scaled_dot_product_attention(padded.transpose(1, 2), keys, values, attn_mask=bias, scale=scaling)
        output[:count] = made.transpose(1, 2)[present].view(count, query.shape[1], -1)
        return output


def _layout(batch: Any, req_to_token: torch.Tensor) -> Layout | None:
    lengths = batch.seq_lens
    key_at = torch.arange(int(lengths.max()))
    held = key_at[None] < lengths[:, None]
    slots = req_to_token[batch.req_pool_indices, : len(key_at)].long().masked_fill(~held, 0).view(-1)
    if batch.forward_mode.is_decode():
        return Layout(slots, _bias(held[:, None]), None)
    if batch.extend_seq_lens is None:
        return None
    new = batch.extend_seq_lens.long()
    query_at = torch.arange(int(new.max()))
    present = query_at[None] < new[:, None]
    position = batch.extend_prefix_lens.long()[:, None] + query_at[None]
    seen = (key_at <= position[:, :, None]) & held[:, None]
    return Layout(slots, _bias(seen | ~present[:, :, None]), present)  # padding sees everything: no 0 / 0


def _bias(seen: torch.Tensor) -> torch.Tensor:
    """[B, Q, L] -> [B, 1, Q, L]."""
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None]


def _gather(cache: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """[slots, heads, size] -> [B, heads, L, size]."""
    return cache.index_select(0, layout.slots).view(*layout.shape, *cache.shape[1:]).transpose(1, 2).to(dtype)
