"""Layers for machines without Transformer Engine, in its places and under its parameter names.

One naming for all machines: checkpoints, conversion and weight sync see the same parameters with and without it.
"""

from __future__ import annotations

import importlib
import logging
import math
from typing import Any

import torch
from torch import nn

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from miles.core.training.bucket_attention import BucketKernel, attend_by_buckets, sdpa_bucket
from miles.megatron.packed_inputs import SegmentedSeqParams
from miles.megatron.sinks import sink_bucket

_LOG = logging.getLogger(__name__)


def install() -> None:
    """Let Megatron-Core build its Transformer Engine layout from the layers of this module, and say so.

    Where Transformer Engine is installed, nothing changes.
    """
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    if specs.HAVE_TE:
        _LOG.info("layers of Transformer Engine")
        return
    _LOG.info("layers of miles.megatron.local_modules: Transformer Engine is not installed")
    setattr(specs, "TESpecProvider", LocalSpecProvider)  # noqa: B010
    setattr(specs, "TENorm", Norm)  # noqa: B010
    latent_attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    setattr(latent_attention, "TELinear", DuplicatedLinear)  # noqa: B010


class Norm(nn.Module):  # type: ignore[misc]
    """RMSNorm or LayerNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self._size = (hidden_size,)
        self._eps = eps
        self.weight = _replicated(torch.ones(hidden_size, dtype=config.params_dtype), config)
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = _replicated(torch.zeros(hidden_size, dtype=config.params_dtype), config)
        self._centered = config.normalization == "LayerNorm"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalized(x, self._size, self.weight, self.bias, self._eps, centered=self._centered)


class NormColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """A norm and the column-parallel layer after it."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self._eps = config.layernorm_epsilon
        self._centered = config.normalization == "LayerNorm"
        self.layer_norm_weight = _replicated(torch.ones(input_size, dtype=config.params_dtype), config)
        self.layer_norm_bias = None
        if self._centered:
            self.layer_norm_bias = _replicated(torch.zeros(input_size, dtype=config.params_dtype), config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = (x.shape[-1],)
        normed = _normalized(x, size, self.layer_norm_weight, self.layer_norm_bias, self._eps, centered=self._centered)
        output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(normed, *args, **kwargs)
        return output


class DuplicatedLinear(nn.Module):  # type: ignore[misc]
    """A layer that every tensor-parallel rank has whole.  Each computes its own part of a divided sequence."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__()
        self.weight = _replicated(torch.empty(output_size, input_size, dtype=config.params_dtype), config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention over packed samples, whole or divided among context-parallel ranks.

    Keys and values of context-parallel ranks are gathered; every rank attends from its own tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self._context = groups.cp
        self._scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self._window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self._window = config.window_size[0] + 1
        self._tensor = groups.tp
        self.softmax_offset: nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // groups.tp.size()
            self.softmax_offset = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: SegmentedSeqParams,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[L, heads, dim] to [L, heads * dim]."""
        if self._context.size() > 1:
            out = self._across_ranks(query, key, value, packed_seq_params)
        else:
            segments = packed_seq_params.segments
            out = attend_by_buckets(self._kernel(), query, key, value, segments, self._scale, self._window)
        return out.reshape(len(out), -1)

    def _across_ranks(
        self, q_L: torch.Tensor, k_L: torch.Tensor, v_L: torch.Tensor, borders: SegmentedSeqParams
    ) -> torch.Tensor:
        """Of each sample, the two chunks of this rank attend to all that comes before them."""
        layout, lengths = borders.layout, borders.segments.lengths
        places = [layout.places(lengths, rank) for rank in range(layout.context_size)]
        order = torch.argsort(torch.cat([torch.from_numpy(own) for own in places])).to(q_L.device)
        k, v = (gather_from_sequence_parallel_region(x_L, group=self._context)[order] for x_L in (k_L, v_L))
        out_L = []
        at = start = 0
        for length in lengths:
            chunk = length // (2 * layout.context_size)
            for number in (layout.context_rank, 2 * layout.context_size - 1 - layout.context_rank):
                end = start + (number + 1) * chunk
                out_L.append(self._attend(q_L[at : at + chunk], k[start:end], v[start:end]))
                at += chunk
            start += length
        return torch.cat(out_L)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The last tokens of ``k`` are those of ``q``."""
        places = torch.arange(len(k), device=q.device)
        distance = places[-len(q) :, None] - places
        mask = distance >= 0 if self._window is None else (distance >= 0) & (distance < self._window)
        rows_q, rows_k, rows_v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = self._kernel()(rows_q, rows_k, rows_v, self._scale, mask)
        return out[0].transpose(0, 1)

    def _kernel(self) -> BucketKernel:
        return sdpa_bucket if self.softmax_offset is None else sink_bucket(self.softmax_offset)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks, divided as the heads are."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tensor,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return state


class ExpertOutput(RowParallelLinear):  # type: ignore[misc]
    """The last layer of an expert.  Its bias is the expert's own, and can be added to its output in place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            # Megatron-Core would sum it over the ranks that share a sequence, and they have other experts.
            self.bias.sequence_parallel = False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, bias = super().forward(x)
        return out if bias is None else out.clone(), bias


class LocalSpecProvider(BackendSpecProvider):  # type: ignore[misc]
    """Which layer stands where."""

    def linear(self) -> type:
        return DuplicatedLinear

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear  # type: ignore[no-any-return]

    def row_parallel_linear(self) -> type:
        return RowParallelLinear  # type: ignore[no-any-return]

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm

    def core_attention(self) -> type:
        return PackedAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules]:
        return SequentialMLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=ExpertOutput)

    def activation_func(self) -> None:
        """The one of the model's configuration."""


def _replicated(values: torch.Tensor, config: TransformerConfig) -> nn.Parameter:
    """A parameter that every tensor-parallel rank holds.  With sequence parallelism its gradients are summed."""
    parameter = nn.Parameter(values)
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


def _normalized(
    x: torch.Tensor,
    size: tuple[int, ...],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    centered: bool,
) -> torch.Tensor:
    if centered:
        return nn.functional.layer_norm(x, size, weight, bias, eps)
    return nn.functional.rms_norm(x, size, weight, eps)
