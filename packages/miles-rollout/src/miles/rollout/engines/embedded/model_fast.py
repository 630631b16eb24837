"""The fast layer: the common decoder family (Llama, Qwen2, Qwen3, Qwen3-MoE), straight from safetensors.

Few operations per layer, all into buffers that are reused; projections that read the same input are one product.
Rotary embedding and attention are as in the models' papers (arXiv:2104.09864, arXiv:2305.13245); results agree with
transformers to rounding.

M = rows, H = heads, K = key-value heads, D = head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from miles.rollout.engines.embedded.adapters import Place
from miles.rollout.engines.embedded.attention import Plan, attend
from miles.rollout.engines.embedded.elementwise import ELEMENT_MULTIPLE
from miles.rollout.engines.embedded.feed_forward import Experts, FeedForward, GatedNetwork
from miles.rollout.engines.embedded.kv import KVShape
from miles.rollout.engines.embedded.memory import available_memory
from miles.rollout.engines.embedded.model import Checkpoint, experts_per_token
from miles.rollout.engines.embedded.projection import Projection
from miles.rollout.engines.embedded.rotary import KINDS, Rotary, rope_parameters
from miles.rollout.engines.embedded.weights import WeightStore

_COPY_SHARE = 4
"""Weights are laid out a second time only when they take less than this part of the free memory."""
_FEWEST_ROWS = 4
"""Fewer rows take other kernels of matrix products, with other roundings."""
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
    kind = rope_parameters(config)["rope_type"]
    return None if kind in KINDS else f"rope type {kind!r} is not supported"


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
    qkv: Projection
    """[(H + 2K) x D, hidden]"""
    head_norm: torch.Tensor | None
    """[H + K, D]"""
    out: Projection
    post_norm: torch.Tensor
    feed_forward: FeedForward


class _Buffers(NamedTuple):
    """Intermediate results of a forward pass, one row each."""

    hidden: torch.Tensor
    qkv: torch.Tensor
    rotated: torch.Tensor
    attended: torch.Tensor

    @classmethod
    def allocate(cls, num_rows: int, shape: _Shape, dtype: torch.dtype) -> _Buffers:
        """Memory for ``num_rows``; zero, so that rows nobody computed are numbers."""
        turned = shape.heads + shape.kv_heads
        return cls(
            hidden=torch.zeros(num_rows, shape.hidden, dtype=dtype),
            qkv=torch.zeros(num_rows, (turned + shape.kv_heads) * shape.dim, dtype=dtype),
            rotated=torch.zeros(num_rows, turned, shape.dim, dtype=dtype),
            attended=torch.zeros(num_rows, shape.heads * shape.dim, dtype=dtype),
        )


class FastModel:
    """See the module's text."""

    kind = "fast"
    batch_invariant = True

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, *, keep_experts: bool = False) -> None:
        shape = self._shape = _Shape.of(checkpoint.config)
        self.dtype = dtype
        self.hidden_size, self.vocab_size = shape.hidden, shape.vocab
        chosen = experts_per_token(checkpoint) if keep_experts else 0
        self.row_multiple = _row_multiple(checkpoint.config)
        self.kv_shape = KVShape(shape.layers, shape.kv_heads, shape.dim, shape.dim, chosen)
        self._embedding = torch.empty(shape.vocab, shape.hidden, dtype=dtype)
        self._head = Projection(self._embedding if shape.tied else torch.empty_like(self._embedding))
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
        self.weights.load_base(checkpoint.path)
        self.adapter_places = self._adapter_places()
        self._may_copy = self.weights.num_bytes < available_memory() // _COPY_SHARE
        self._rotary = Rotary(rope_parameters(checkpoint.config), shape.dim, dtype)
        self._buffers = _Buffers.allocate(0, shape, dtype)
        self._projections = [self._head]
        for layer in self._layers:
            self._projections += [layer.qkv, layer.out, *layer.feed_forward.projections]
        self._laid_out = 0

    def forward(self, plan: Plan) -> torch.Tensor:
        """See Model."""
        shape = self._shape
        self._take_in_weights()
        buffers = self._rows(plan.tokens.shape[0])
        hidden = torch.index_select(self._embedding, 0, plan.tokens, out=buffers.hidden)
        cos, sin = self._rotary.at(plan.positions)
        attended = buffers.attended.view(-1, shape.heads, shape.dim)
        for number, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, (shape.hidden,), layer.input_norm, shape.eps)
            queries, keys, values = self._project(layer, normed, buffers, cos, sin)
            attend(plan, number, queries, keys, values, attended, scale=shape.dim**-0.5)
            hidden = layer.out.add_to(hidden, buffers.attended)
            normed = F.rms_norm(hidden, (shape.hidden,), layer.post_norm, shape.eps)
            hidden = layer.feed_forward.add_to(hidden, normed)
            if self.kv_shape.experts_per_token and layer.feed_forward.chosen is not None:
                _keep_experts(plan, number, layer.feed_forward.chosen)
        return F.rms_norm(hidden, (shape.hidden,), self._norm, shape.eps)

    def free_copies(self) -> int:
        """See Model.  Laid-out weights are made again before the first forward pass after a change."""
        freed = sum(projection.forget_layout() for projection in self._projections)
        self._buffers = _Buffers.allocate(0, self._shape, self.dtype)
        return freed

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """See Model."""
        room = out if self.dtype is torch.float32 else out.to(self.dtype)
        result = self._head(hidden, room)
        if result is not out:
            out.copy_(result)

    def _project(
        self, layer: _Layer, normed: torch.Tensor, buffers: _Buffers, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [M, H, D], keys and values [M, K, D], rotated."""
        shape = self._shape
        heads = layer.qkv(normed, buffers.qkv).view(normed.shape[0], -1, shape.dim)
        turned = heads[:, : shape.heads + shape.kv_heads]
        if layer.head_norm is not None:
            turned = F.rms_norm(turned, (shape.dim,), None, shape.eps).mul_(layer.head_norm)
        half = shape.dim // 2
        rotated = torch.mul(turned, cos, out=buffers.rotated)
        rotated.addcmul_(torch.cat([turned[..., half:], turned[..., :half]], -1), sin)
        return rotated[:, : shape.heads], rotated[:, shape.heads :], heads[:, shape.heads + shape.kv_heads :]

    def _take_in_weights(self) -> None:
        """Lay changed weights out, where there is memory for a second copy."""
        if self._laid_out != self.weights.num_writes:
            self._laid_out = self.weights.num_writes
            if self._may_copy:
                for projection in self._projections:
                    projection.lay_out()

    def _rows(self, num_rows: int) -> _Buffers:
        if num_rows > self._buffers.hidden.shape[0]:
            self._buffers = _Buffers.allocate(num_rows, self._shape, self.dtype)
        return _Buffers(*(buffer[:num_rows] for buffer in self._buffers))

    def _attention_parts(self) -> dict[str, range]:
        """Outputs of the first product of attention."""
        shape = self._shape
        q, kv = shape.heads * shape.dim, shape.kv_heads * shape.dim
        return {"q_proj": range(q), "k_proj": range(q, q + kv), "v_proj": range(q + kv, q + 2 * kv)}

    def _adapter_places(self) -> dict[str, Place]:
        """See Model."""
        places = {}
        for number, layer in enumerate(self._layers):
            prefix = f"model.layers.{number}"
            for name, part in self._attention_parts().items():
                places[f"{prefix}.self_attn.{name}"] = Place(layer.qkv, part)
            places[f"{prefix}.self_attn.o_proj"] = Place(layer.out, range(self._shape.hidden))
            places |= layer.feed_forward.adapter_places(f"{prefix}.mlp")
        return places

    def _views(self) -> dict[str, torch.Tensor]:
        """Each Hugging Face name and its place."""
        shape = self._shape
        parts = {name: slice(part.start, part.stop) for name, part in self._attention_parts().items()}
        views = {"model.embed_tokens.weight": self._embedding}
        for number, layer in enumerate(self._layers):
            prefix = f"model.layers.{number}"
            for name, part in parts.items():
                views[f"{prefix}.self_attn.{name}.weight"] = layer.qkv.weight[part]
                if layer.qkv.bias is not None:
                    views[f"{prefix}.self_attn.{name}.bias"] = layer.qkv.bias[part]
            views[f"{prefix}.self_attn.o_proj.weight"] = layer.out.weight
            if layer.out.bias is not None:
                views[f"{prefix}.self_attn.o_proj.bias"] = layer.out.bias
            if layer.head_norm is not None:
                views[f"{prefix}.self_attn.q_norm.weight"] = layer.head_norm[0]
                views[f"{prefix}.self_attn.k_norm.weight"] = layer.head_norm[shape.heads]
            views.update(layer.feed_forward.views(f"{prefix}.mlp"))
            views[f"{prefix}.input_layernorm.weight"] = layer.input_norm
            views[f"{prefix}.post_attention_layernorm.weight"] = layer.post_norm
        views["model.norm.weight"] = self._norm
        if not shape.tied:
            views["lm_head.weight"] = self._head.weight
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


def _keep_experts(plan: Plan, layer: int, chosen: torch.Tensor) -> None:
    numbers = chosen.numpy()
    for segment in plan.segments:
        segment.pool.write_experts(layer, segment.slots, segment.positions, numbers[segment.rows])


def _row_multiple(config: dict[str, Any]) -> int:
    """Rows that fill the vectors of elementwise functions (see elementwise.py), and enough for matrix products."""
    sizes = [config[name] for name in ("intermediate_size", "moe_intermediate_size") if config.get(name)]
    return max([_FEWEST_ROWS, *(ELEMENT_MULTIPLE // math.gcd(ELEMENT_MULTIPLE, size) for size in sizes)])


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
        qkv=Projection(empty(width, shape.hidden), empty(width) if shape.qkv_bias else None),
        head_norm=empty(shape.heads + shape.kv_heads, shape.dim) if shape.head_norm else None,
        out=Projection(empty(shape.hidden, shape.heads * shape.dim), empty(shape.hidden) if shape.o_bias else None),
        post_norm=empty(shape.hidden),
        feed_forward=feed_forward,
    )
