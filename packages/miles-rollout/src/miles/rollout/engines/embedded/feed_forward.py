"""The feed-forward part of a decoder layer: one gated network, or many experts (Qwen3-MoE).

M = rows, I = intermediate size, E = experts, A = experts per token, C = rows per expert.
"""

from __future__ import annotations

from typing import Protocol

import torch

from miles.rollout.engines.embedded.adapters import Place
from miles.rollout.engines.embedded.attention import ROW_MULTIPLE
from miles.rollout.engines.embedded.elementwise import silu_
from miles.rollout.engines.embedded.projection import Projection

Views = dict[str, torch.Tensor]


class FeedForward(Protocol):
    """Adds its result to the residual stream."""

    projections: list[Projection]
    chosen: torch.Tensor | None
    """[M, A] numbers of the experts that the rows of the last call used; None without experts."""

    def add_to(self, hidden: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """``hidden`` [M, hidden] + f(``normed`` [M, hidden]); ``hidden`` may be overwritten."""

    def views(self, prefix: str) -> Views:
        """Each Hugging Face name and its place."""

    def fused_views(self, prefix: str) -> dict[str, tuple[torch.Tensor, list[str]]]:
        """Names under which transformers' modules hold several tensors as one: the place, and the single names."""

    def adapter_places(self, prefix: str) -> dict[str, Place]:
        """Its linear layers that can be given adapters, by their Hugging Face names."""


class GatedNetwork:
    """``down(silu(gate(x)) * up(x))`` (arXiv:2002.05202)."""

    chosen: torch.Tensor | None = None

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        self._gate = Projection(torch.empty(intermediate, hidden, dtype=dtype))
        self._up = Projection(torch.empty(intermediate, hidden, dtype=dtype))
        self._down = Projection(torch.empty(hidden, intermediate, dtype=dtype))
        self.projections = [self._gate, self._up, self._down]
        self._room = torch.empty(0, intermediate, dtype=dtype)

    def add_to(self, hidden: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """See FeedForward."""
        count = normed.shape[0]
        if self._room.shape[0] < 2 * count:
            self._room = self._room.new_empty(2 * count, self._room.shape[1])
        gate = self._gate.silu(normed, self._room[:count])
        up = self._up(normed, self._room[count : 2 * count])
        return self._down.add_to(hidden, gate.mul_(up))

    def views(self, prefix: str) -> Views:
        """See FeedForward."""
        return {
            f"{prefix}.gate_proj.weight": self._gate.weight,
            f"{prefix}.up_proj.weight": self._up.weight,
            f"{prefix}.down_proj.weight": self._down.weight,
        }

    def fused_views(self, prefix: str) -> dict[str, tuple[torch.Tensor, list[str]]]:
        """See FeedForward."""
        return {}

    def adapter_places(self, prefix: str) -> dict[str, Place]:
        """See FeedForward."""
        named = zip(("gate_proj", "up_proj", "down_proj"), self.projections, strict=True)
        return {f"{prefix}.{name}": Place(each, range(each.weight.shape[0])) for name, each in named}


class Experts:
    """Several gated networks, of which each row uses a few, weighted by a router (arXiv:2505.09388).

    Every expert computes the same number of rows, a multiple of ROW_MULTIPLE, so that a row's result does not depend
    on how many others chose its expert.
    """

    def __init__(
        self, hidden: int, intermediate: int, num_experts: int, num_chosen: int, normalized: bool, dtype: torch.dtype
    ) -> None:
        self._num_chosen, self._normalized = num_chosen, normalized
        self.projections: list[Projection] = []
        self.chosen: torch.Tensor | None = None
        self._router = torch.empty(num_experts, hidden, dtype=dtype)
        self._gate_up = torch.empty(num_experts, 2 * intermediate, hidden, dtype=dtype)
        self._down = torch.empty(num_experts, hidden, intermediate, dtype=dtype)

    def add_to(self, hidden: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """See FeedForward."""
        weights, chosen = self._route(normed)
        self.chosen = chosen
        num_experts, size = self._router.shape[0], self._down.shape[2]
        place, capacity = _places(chosen, num_experts)
        rows = normed.new_zeros(num_experts * capacity, normed.shape[1])
        rows[place] = normed.repeat_interleave(self._num_chosen, 0)
        rows = rows.view(num_experts, capacity, -1)
        gate = torch.bmm(rows, self._gate_up[:, :size].transpose(1, 2))
        up = torch.bmm(rows, self._gate_up[:, size:].transpose(1, 2))
        results = torch.bmm(silu_(gate).mul_(up), self._down.transpose(1, 2)).view(num_experts * capacity, -1)
        parts = results[place].view(*chosen.shape, -1).mul_(weights[..., None])
        for part in parts.unbind(1):
            hidden.add_(part)
        return hidden

    def _route(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and numbers [M, A] of the experts that each row uses."""
        scores = torch.softmax(torch.mm(normed, self._router.t()).float(), -1)
        weights, chosen = scores.topk(self._num_chosen, dim=-1)
        if self._normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(normed.dtype), chosen

    def views(self, prefix: str) -> Views:
        """See FeedForward."""
        views = {f"{prefix}.gate.weight": self._router}
        size = self._down.shape[2]
        for number in range(self._router.shape[0]):
            views[f"{prefix}.experts.{number}.gate_proj.weight"] = self._gate_up[number, :size]
            views[f"{prefix}.experts.{number}.up_proj.weight"] = self._gate_up[number, size:]
            views[f"{prefix}.experts.{number}.down_proj.weight"] = self._down[number]
        return views

    def fused_views(self, prefix: str) -> dict[str, tuple[torch.Tensor, list[str]]]:
        """See FeedForward."""
        numbers = range(self._router.shape[0])
        single = [f"{prefix}.experts.{number}" for number in numbers]
        gate_up = [f"{name}.{part}_proj.weight" for name in single for part in ("gate", "up")]
        return {
            f"{prefix}.experts.gate_up_proj": (self._gate_up, gate_up),
            f"{prefix}.experts.down_proj": (self._down, [f"{name}.down_proj.weight" for name in single]),
        }

    def adapter_places(self, prefix: str) -> dict[str, Place]:
        """See FeedForward.  Rows of many experts are one product, which has no place for adapters."""
        return {}


def _places(chosen: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, int]:
    """Row [M x A] in the experts' buffers [E, C] for each choice of ``chosen`` [M, A], and C."""
    flat = chosen.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts)
    capacity = -(-int(counts.max()) // ROW_MULTIPLE) * ROW_MULTIPLE
    order = flat.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(flat.numel()) - starts[flat[order]]
    return flat * capacity + rank, capacity
