"""The fast layer: the common decoder family (Llama, Qwen2, Qwen3, Qwen3-MoE), straight from safetensors.

Few operations per layer, all into buffers that are reused; projections that read the same input are one product.
Rotary embedding and attention are as in the models' papers (arXiv:2104.09864, arXiv:2305.13245); results agree with
transformers to rounding.

M = rows, H = heads, K = key-value heads, D = head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from miles.rollout.engines.embedded.attention import Plan, attend
from miles.rollout.engines.embedded.feed_forward import Experts, FeedForward, GatedNetwork
from miles.rollout.engines.embedded.kv import KVShape
from miles.rollout.engines.embedded.model import Checkpoint
from miles.rollout.engines.embedded.weights import WeightStore

_QWEN3 = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", *_QWEN3)


def unsupported(config: dict[str, Any]) -> str | None:
    """Why the fast layer cannot serve a configuration; None when it can."""
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in _ARCHITECTURES:
        return f"architecture {architecture} is not one of {', '.join(_ARCHITECTURES)}"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']!r}, not 'silu'"
    if config.get("use_sliding_window"):
        return "use_sliding_window is set"
    if config.get("mlp_bias"):
        return "mlp_bias is set"
    if config.get("quantization_config"):
        return "the checkpoint is quantized"
    for size in ("intermediate_size", "moe_intermediate_size"):
        if config.get(size, 0) % 8:
            return f"{size} is not a multiple of 8"
    kind = _rope(config)["rope_type"]
    return None if kind in ("default", "linear", "llama3") else f"rope type {kind!r} is not supported"


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return rope


@dataclass(frozen=True, slots=True)
class _Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    eps: float
    qkv_bias: bool
    o_bias: bool
    head_norm: bool
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> _Shape:
        architecture = config["architectures"][0]
        heads = config["num_attention_heads"]
        llama_bias = architecture != "Qwen2ForCausalLM" and bool(config.get("attention_bias"))
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            eps=config.get("rms_norm_eps", 1e-6),
            qkv_bias=architecture == "Qwen2ForCausalLM" or llama_bias,
            o_bias=llama_bias,
            head_norm=architecture in _QWEN3,
            tied=bool(config.get("tie_word_embeddings", False)),
        )


@dataclass(slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    """[(H + 2K) x D, hidden]"""
    qkv_bias: torch.Tensor | None
    head_norm: torch.Tensor | None
    """[H + K, D]"""
    out: torch.Tensor
    out_bias: torch.Tensor | None
    post_norm: torch.Tensor
    feed_forward: FeedForward


@dataclass(slots=True)
class _Buffers:
    """Intermediate results of a forward pass of M rows."""

    hidden: torch.Tensor
    qkv: torch.Tensor
    rotated: torch.Tensor
    attended: torch.Tensor


class FastModel:
    """See the module's text."""

    kind = "fast"
    batch_invariant = True

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        shape = self._shape = _Shape.of(checkpoint.config)
        self.dtype = dtype
        self.hidden_size, self.vocab_size = shape.hidden, shape.vocab
        self.kv_shape = KVShape(shape.layers, shape.kv_heads, shape.dim, shape.dim, dtype)
        self._embedding = torch.empty(shape.vocab, shape.hidden, dtype=dtype)
        self._head = self._embedding if shape.tied else torch.empty_like(self._embedding)
        self._norm = torch.empty(shape.hidden, dtype=dtype)
        self._layers = [
            _allocate(shape, _feed_forward(checkpoint.config, number, dtype), dtype) for number in range(shape.layers)
        ]
        aliases = {"lm_head.weight": "model.embed_tokens.weight"} if shape.tied else {}
        fused = {
            name: place
            for number, layer in enumerate(self._layers)
            for name, place in layer.feed_forward.fused_views(f"model.layers.{number}.mlp").items()
        }
        self.weights = WeightStore(self._views(), aliases, self._copies(), fused)
        self.weights.load_directory(checkpoint.path)
        self._rotary = _Rotary(_rope(checkpoint.config), shape.dim, dtype)
        self._buffers: dict[int, _Buffers] = {}

    def forward(self, plan: Plan) -> torch.Tensor:
        """See Model."""
        shape = self._shape
        buffers = self._buffers_of(plan.tokens.shape[0])
        hidden = torch.index_select(self._embedding, 0, plan.tokens, out=buffers.hidden)
        cos, sin = self._rotary.at(plan.positions)
        for number, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, (shape.hidden,), layer.input_norm, shape.eps)
            queries, keys, values = self._project(layer, normed, buffers, cos, sin)
            attended = buffers.attended.view(-1, shape.heads, shape.dim)
            attend(plan, number, queries, keys, values, attended, scale=shape.dim**-0.5)
            hidden.addmm_(buffers.attended, layer.out.t())
            if layer.out_bias is not None:
                hidden.add_(layer.out_bias)
            normed = F.rms_norm(hidden, (shape.hidden,), layer.post_norm, shape.eps)
            layer.feed_forward.add_to(hidden, normed)
        return F.rms_norm(hidden, (shape.hidden,), self._norm, shape.eps)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """See Model."""
        if self.dtype is torch.float32:
            torch.mm(hidden, self._head.t(), out=out)
        else:
            out.copy_(F.linear(hidden, self._head))

    def _project(
        self, layer: _Layer, normed: torch.Tensor, buffers: _Buffers, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [M, H, D], keys and values [M, K, D], rotated."""
        shape = self._shape
        torch.mm(normed, layer.qkv.t(), out=buffers.qkv)
        if layer.qkv_bias is not None:
            buffers.qkv.add_(layer.qkv_bias)
        heads = buffers.qkv.view(normed.shape[0], -1, shape.dim)
        turned = heads[:, : shape.heads + shape.kv_heads]
        if layer.head_norm is not None:
            turned = F.rms_norm(turned, (shape.dim,), None, shape.eps).mul_(layer.head_norm)
        half = shape.dim // 2
        rotated = torch.mul(turned, cos, out=buffers.rotated)
        rotated.addcmul_(torch.cat([turned[..., half:], turned[..., :half]], -1), sin)
        return rotated[:, : shape.heads], rotated[:, shape.heads :], heads[:, shape.heads + shape.kv_heads :]

    def _buffers_of(self, num_rows: int) -> _Buffers:
        buffers = self._buffers.get(num_rows)
        if buffers is None:
            shape, options = self._shape, {"dtype": self.dtype}
            turned = shape.heads + shape.kv_heads
            buffers = _Buffers(
                hidden=torch.zeros(num_rows, shape.hidden, **options),
                qkv=torch.zeros(num_rows, (turned + shape.kv_heads) * shape.dim, **options),
                # One row more: attention may read a few heads beyond the last row's (see attention.py).
                rotated=torch.zeros(num_rows + 1, turned, shape.dim, **options)[:num_rows],
                attended=torch.zeros(num_rows, shape.heads * shape.dim, **options),
            )
            self._buffers[num_rows] = buffers
        return buffers

    def _views(self) -> dict[str, torch.Tensor]:
        """Each Hugging Face name and its place."""
        shape = self._shape
        q, kv = shape.heads * shape.dim, shape.kv_heads * shape.dim
        parts = {"q_proj": slice(0, q), "k_proj": slice(q, q + kv), "v_proj": slice(q + kv, q + 2 * kv)}
        views = {"model.embed_tokens.weight": self._embedding}
        for number, layer in enumerate(self._layers):
            prefix = f"model.layers.{number}"
            for name, part in parts.items():
                views[f"{prefix}.self_attn.{name}.weight"] = layer.qkv[part]
                if layer.qkv_bias is not None:
                    views[f"{prefix}.self_attn.{name}.bias"] = layer.qkv_bias[part]
            views[f"{prefix}.self_attn.o_proj.weight"] = layer.out
            if layer.out_bias is not None:
                views[f"{prefix}.self_attn.o_proj.bias"] = layer.out_bias
            if layer.head_norm is not None:
                views[f"{prefix}.self_attn.q_norm.weight"] = layer.head_norm[0]
                views[f"{prefix}.self_attn.k_norm.weight"] = layer.head_norm[shape.heads]
            views.update(layer.feed_forward.views(f"{prefix}.mlp"))
            views[f"{prefix}.input_layernorm.weight"] = layer.input_norm
            views[f"{prefix}.post_attention_layernorm.weight"] = layer.post_norm
        views["model.norm.weight"] = self._norm
        if not shape.tied:
            views["lm_head.weight"] = self._head
        return views

    def _copies(self) -> dict[str, torch.Tensor]:
        """Where a norm of queries or keys is repeated: once per head, so that one product applies both."""
        copies = {}
        for number, layer in enumerate(self._layers):
            if layer.head_norm is not None:
                prefix = f"model.layers.{number}.self_attn"
                copies[f"{prefix}.q_norm.weight"] = layer.head_norm[1 : self._shape.heads]
                copies[f"{prefix}.k_norm.weight"] = layer.head_norm[self._shape.heads + 1 :]
        return copies


def _feed_forward(config: dict[str, Any], number: int, dtype: torch.dtype) -> FeedForward:
    """Of layer ``number``: a Qwen3-MoE model has experts in most layers."""
    num_experts = config.get("num_experts") or config.get("num_local_experts") or 0  # transformers 4 and 5
    sparse = (
        num_experts > 0
        and number not in (config.get("mlp_only_layers") or [])
        and (number + 1) % config.get("decoder_sparse_step", 1) == 0
    )
    if not sparse:
        return GatedNetwork(config["hidden_size"], config["intermediate_size"], dtype)
    return Experts(
        config["hidden_size"],
        config["moe_intermediate_size"],
        num_experts,
        config["num_experts_per_tok"],
        bool(config.get("norm_topk_prob", False)),
        dtype,
    )


def _allocate(shape: _Shape, feed_forward: FeedForward, dtype: torch.dtype) -> _Layer:
    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype)

    width = (shape.heads + 2 * shape.kv_heads) * shape.dim
    return _Layer(
        input_norm=empty(shape.hidden),
        qkv=empty(width, shape.hidden),
        qkv_bias=empty(width) if shape.qkv_bias else None,
        head_norm=empty(shape.heads + shape.kv_heads, shape.dim) if shape.head_norm else None,
        out=empty(shape.hidden, shape.heads * shape.dim),
        out_bias=empty(shape.hidden) if shape.o_bias else None,
        post_norm=empty(shape.hidden),
        feed_forward=feed_forward,
    )


class _Rotary:
    """Cosines and sines by position, computed as far as they are needed.

    The sine's sign is that of ``(-x2, x1)``, so that rotating needs no negation.
    """

    def __init__(self, rope: dict[str, Any], dim: int, dtype: torch.dtype) -> None:
        self._frequencies = _frequencies(rope, dim)
        self._dtype = dtype
        self._table = torch.empty(0, 2, dim, dtype=dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [M, 1, D] at ``positions`` [M]."""
        needed = int(positions.max()) + 1
        if needed > self._table.shape[0]:
            self._table = self._compute(max(needed, 2 * self._table.shape[0], 256))
        rows = self._table.index_select(0, positions)
        return rows[:, :1], rows[:, 1:]

    def _compute(self, length: int) -> torch.Tensor:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)
        sin = angles.sin()
        cos = angles.cos()
        return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1).to(self._dtype)


def _frequencies(rope: dict[str, Any], dim: int) -> torch.Tensor:
    """[D / 2] radians per position."""
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Llama 3's context extension: low frequencies are divided, high ones kept, the band between is blended."""
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    blend = (length / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / factor, frequencies)
    between = (wavelengths <= length / low) & (wavelengths >= length / high)
    return torch.where(between, blended, scaled)
