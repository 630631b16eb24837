"""A decoder layer as two nodes of the graph, with backward passes by hand, for small models on CPUs.

Of a layer of 64 hidden units, much of the time goes into hundreds of operations on small tensors: calls, nodes of the
graph, copies into fresh memory.  Here both passes are a few dozen operations, matrix products add gradients up by
themselves, and what is cheap to compute again is not kept.

P = tokens of the pack, E = hidden size, H = heads, K = heads of keys, D = size of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from miles.core.training.bucket_attention import are_short
from miles.core.training.segments import Segments
from miles.core.training.short_attention import MAX_LENGTH, ShortRows, attention, attention_gradients
from miles.fsdp.fused_norm import rms_gradients, rms_scale

# What rounding may change, relative to the largest number: both sides compute in fp32.
_TOLERANCE = 1e-4
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# The weights of each half, in the order in which it takes them.
_ATTENTION = (_NORMS[0], *_PROJECTIONS, *_HEAD_NORMS)
_GATED_MLP = (_NORMS[1], *_MLP)
# Two samples that share a prompt: what the trial of a layer computes on.
_TRIAL_LENGTHS = (5, 4)
_TRIAL_TOKENS = (0, 1, 2, 3, 4, 0, 1, 2, 5)
_TRIAL_POSITIONS = (0, 1, 2, 3, 4, 3)
_Traits = tuple[tuple[str, str, object], ...]


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is not a tensor."""

    heads: int
    key_heads: int
    size: int
    scale: float
    eps: float
    head_eps: float | None
    """None: queries and keys have no norm of their own."""

    def parts(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[P, H + K, D] as [P, H * D] of queries and [P, K * D] of keys."""
        flat, own = heads.view(len(heads), -1), self.heads * self.size
        return flat[:, :own], flat[:, own:]


def fuse_layers(layers: Iterable[nn.Module]) -> int:
    """Let those layers compute in one step that are pre-norm attention and a gated MLP, and say how many.

    One of each kind is tried first, with weights of its own: outputs and gradients have to agree, and ranks whose
    weights are still to come decide alike.  Calls with long samples, or with anything else that is not computed here,
    are left to the layer.
    """
    kinds: dict[_Traits, list[nn.Module]] = {}
    for layer in filter(_fits, layers):
        kinds.setdefault(_traits(layer), []).append(layer)
    fused = [layer for kind in kinds.values() if _agrees(kind[0]) for layer in kind]
    for layer in fused:
        layer.forward = MethodType(_forward, layer)
    return len(fused)


def _traits(layer: nn.Module) -> _Traits:
    """What tells layers of one class apart, such as whether they know positions: all that is not a tensor."""
    return tuple(
        (name, key, value)
        for name, part in layer.named_modules()
        for key, value in vars(part).items()
        if key != "layer_idx" and (value is None or isinstance(value, bool | int | float | str))
    )


def _forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The new forward, which leaves to that of the class what it does not compute.

    The class is looked up at each call: FSDP gives sharded layers one of its own, and transformers computes a layer
    again in the backward pass only by the forward of its present class.
    """
    segments: Any = kwargs.get("segments")
    rotation: Any = kwargs.get("position_embeddings")
    takes = not args and rotation is not None and _takes(hidden_states, segments)
    out: torch.Tensor
    if not takes or not _fits(self) or rotation[0].shape[-1] != self.self_attn.head_dim:
        out = type(self).forward(self, hidden_states, *args, **kwargs)
    elif self.training and getattr(self, "gradient_checkpointing", False):
        out = self._gradient_checkpointing_func(_computed, self, hidden_states, rotation, segments)
    else:
        out = _computed(self, hidden_states, rotation, segments)
    return out


def _computed(
    layer: nn.Module, hidden_states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], segments: Segments
) -> torch.Tensor:
    shape = _shape(layer)
    cos_PD, sin_PD = (x[0] for x in rotation)
    half = shape.size // 2
    turn = cos_PD[:, None], torch.cat((-sin_PD[:, :half], sin_PD[:, half:]), dim=-1)[:, None]
    rows = segments.short_rows(shape.heads, shape.key_heads)
    x: torch.Tensor = _Attention.apply(hidden_states[0], turn, rows, shape, *_weights(layer, _ATTENTION))
    out: torch.Tensor = _GatedMlp.apply(x, shape.eps, *_weights(layer, _GATED_MLP))
    return out


def _takes(hidden_states: torch.Tensor, segments: Any) -> bool:
    """Whether these are the activations of one pack of short samples, without filling."""
    if not isinstance(segments, Segments) or hidden_states.dtype != torch.float32 or len(hidden_states) != 1:
        return False
    return hidden_states.shape[1] == segments.num_rows and are_short(hidden_states, segments, None)


def _fits(layer: nn.Module) -> bool:
    """Whether the layer has the parts that are computed here, no adapters or biases on them, and nobody who watches."""
    if any(name not in dict(layer.named_children()) for name in (*_NORMS, "self_attn", "mlp")):
        return False
    if any(_is_watched(part) for part in layer.modules() if part is not layer):
        return False
    linears: list[Any] = [_part(layer, name) for name in (*_PROJECTIONS, *_MLP)]
    if not all(type(linear) is nn.Linear and linear.bias is None for linear in linears):
        return False
    norms = [_part(layer, name) for name in (*_NORMS, *_HEAD_NORMS)]
    if any(norm is not None and not isinstance(getattr(norm, "variance_epsilon", None), float) for norm in norms):
        return False
    attention = layer.self_attn
    return isinstance(getattr(attention, "head_dim", None), int) and _window(attention) is None


def _is_watched(part: nn.Module) -> bool:
    """Whether it has hooks, which run when the part itself is called."""
    kinds = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(kinds)


def _window(attention: nn.Module) -> int | None:
    """How far back queries look.  Where layers do not differ (Mistral), only the model's configuration says it."""
    config = getattr(attention, "config", None)
    window: int | None = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return window if window is not None and window < MAX_LENGTH else None


def _part(layer: nn.Module, name: str) -> nn.Module | None:
    parent, _, child = name.partition(".")
    part = getattr(layer, parent)
    return getattr(part, child, None) if child else part


def _shape(layer: nn.Module) -> _Shape:
    attention, size = layer.self_attn, layer.self_attn.head_dim
    norm = getattr(attention, "q_norm", None)
    return _Shape(
        heads=attention.q_proj.out_features // size,
        key_heads=attention.k_proj.out_features // size,
        size=size,
        scale=float(attention.scaling),
        eps=layer.input_layernorm.variance_epsilon,
        head_eps=None if norm is None else norm.variance_epsilon,
    )


def _weights(layer: nn.Module, names: Iterable[str]) -> list[torch.Tensor | None]:
    return [None if (part := _part(layer, name)) is None else part.weight for name in names]


def _agrees(layer: nn.Module) -> bool:
    """Whether outputs and gradients of a few tokens are those of the layer as it is written out."""
    if not all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in layer.parameters()):
        return False
    twin = _twin(layer)
    segments = Segments(_TRIAL_LENGTHS, torch.device("cpu"), np.asarray(_TRIAL_TOKENS))
    size, hidden = twin.self_attn.head_dim, twin.self_attn.q_proj.in_features
    angle = torch.tensor(_TRIAL_POSITIONS)[:, None] * torch.linspace(1.0, 0.1, size // 2).repeat(2)
    rotation = angle.cos()[None], angle.sin()[None]
    x = torch.arange(segments.num_rows * hidden, dtype=torch.float32).sin().view(1, -1, hidden).requires_grad_()
    written_out = twin(x, attention_mask=None, position_embeddings=rotation, segments=segments)
    if not isinstance(written_out, torch.Tensor) or not _takes(x, segments):
        return False
    mine = _computed(twin, x, rotation, segments)
    return _close(mine, written_out) and _same_gradients(mine, written_out, [x, *twin.parameters()])


@torch.no_grad()  # type: ignore[untyped-decorator]
def _twin(layer: nn.Module) -> Any:
    """The same layer in host memory, with weights of the usual sizes."""
    twin = copy.deepcopy(layer).to_empty(device="cpu")
    for parameter in twin.parameters():
        wave = torch.arange(parameter.numel(), dtype=torch.float32).sin().view_as(parameter)
        parameter.copy_(1.0 + wave / 2 if parameter.ndim == 1 else wave * parameter.shape[1] ** -0.5)
    return twin


def _same_gradients(mine: torch.Tensor, expected: torch.Tensor, inputs: Sequence[torch.Tensor]) -> bool:
    weight = torch.linspace(-1.0, 2.0, mine.numel()).view_as(mine)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True) for out in (mine, expected))
    pairs = zip(ours, theirs, strict=True)
    return all(one is not None and other is not None and _close(one, other) for one, other in pairs)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """x [P, E] to x + attention of its norm.  ``turn``: cosines and signed sines of the positions, [P, 1, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        rows: ShortRows,
        shape: _Shape,
        *weights: Any,
    ) -> torch.Tensor:
        norm_w, q_w, k_w, v_w, o_w, q_norm_w, k_norm_w = weights
        scale = rms_scale(x, shape.eps)
        normed = (x * scale).mul_(norm_w)
        heads = x.new_empty(len(x), shape.heads + shape.key_heads, shape.size)
        q, k = shape.parts(heads)
        torch.mm(normed, q_w.T, out=q)
        torch.mm(normed, k_w.T, out=k)
        head_scale = head_w = None
        turned = heads
        if shape.head_eps is not None:
            head_scale = rms_scale(heads, shape.head_eps)
            head_w = torch.cat((q_norm_w.expand(shape.heads, -1), k_norm_w.expand(shape.key_heads, -1)))
            turned = (heads * head_scale).mul_(head_w)
        q, k = _turned(turned, turn).split((shape.heads, shape.key_heads), dim=1)
        v = (normed @ v_w.T).view(len(x), shape.key_heads, -1)
        attended, kept = attention(q, k, v, rows, shape.scale)
        attended = attended.view(len(x), -1)
        ctx.save_for_backward(x, scale, heads, head_scale, head_w, attended, *turn, *weights[:5], *kept)
        ctx.rows, ctx.shape = rows, shape
        return torch.addmm(x, attended, o_w.T)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, heads, head_scale, head_w, attended, cos, sin, *rest = ctx.saved_tensors
        (norm_w, q_w, k_w, v_w, o_w), kept = rest[:5], rest[5:]
        shape: _Shape = ctx.shape
        grad_attended = (grad @ o_w).view(len(x), shape.heads, -1)
        grad_q, grad_k, grad_v = attention_gradients(grad_attended, kept, ctx.rows, shape.scale)
        grad_heads = _turned_back(torch.cat((grad_q, grad_k), dim=1), (cos, sin))
        of_norms: tuple[torch.Tensor | None, ...] = (None, None)
        if head_w is not None:
            grad_heads, of_heads = rms_gradients(grad_heads, heads * head_scale, head_w, head_scale)
            of_norms = tuple(part.sum(0) for part in of_heads.split((shape.heads, shape.key_heads)))
        parts = *shape.parts(grad_heads), grad_v.view(len(x), -1)
        normed = x * scale
        scaled = normed * norm_w
        of_projections = [part.T @ scaled for part in parts]
        grad_normed = (parts[0] @ q_w).addmm_(parts[1], k_w).addmm_(parts[2], v_w)
        grad_x, of_norm = rms_gradients(grad_normed, normed, norm_w, scale)
        return grad_x.add_(grad), None, None, None, of_norm, *of_projections, grad.T @ attended, *of_norms


class _GatedMlp(torch.autograd.Function):  # type: ignore[misc]
    """x [P, E] to x + MLP of its norm, as the row [1, P, E] that layers pass on: no view, which FSDP warns of."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float, *weights: torch.Tensor) -> torch.Tensor:
        norm_w, gate_w, up_w, down_w = weights
        scale = rms_scale(x, eps)
        normed = (x * scale).mul_(norm_w)
        gate, up = normed @ gate_w.T, normed @ up_w.T
        ctx.save_for_backward(x, scale, gate, up, *weights)
        out = x.new_empty(1, *x.shape)
        torch.addmm(x, F.silu(gate).mul_(up), down_w.T, out=out[0])
        return out

    @staticmethod
    def backward(ctx: Any, grad_row: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grad_row[0]
        x, scale, gate, up, norm_w, gate_w, up_w, down_w = ctx.saved_tensors
        opened = F.silu(gate)
        of_down = grad.T @ (opened * up)
        grad_inner = grad @ down_w
        grad_up = opened.mul_(grad_inner)
        grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(up), gate)
        normed = x * scale
        scaled = normed * norm_w
        grad_normed = (grad_gate @ gate_w).addmm_(grad_up, up_w)
        grad_x, of_norm = rms_gradients(grad_normed, normed, norm_w, scale)
        return grad_x.add_(grad), None, of_norm, grad_gate.T @ scaled, grad_up.T @ scaled, of_down


def _turned(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions: halves of [P, H, D] turned into one another."""
    cos, sin = turn
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def _turned_back(grad: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The gradient before ``_turned``."""
    cos, sin = turn
    return (grad * cos).add_((grad * sin).roll(grad.shape[-1] // 2, -1))
