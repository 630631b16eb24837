"""Linear layers of Megatron-Core with adapters: ``W x + (alpha / r) B A x`` whose ``W`` is frozen.

A layer may hold several of a checkpoint's layers (query, key and value projection); each of these has an adapter of its
own, so that adapters mean the same in every layout and elsewhere.

r = rank, I = inputs, O = outputs of a layer, all of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from miles.megatron.local_modules import NormColumnParallelLinear


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".adapters." in name


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of ``model`` are adapted."""
    return any(isinstance(module, AdaptedLinear) for module in model.modules())


class Adapter(nn.Module):  # type: ignore[misc]
    """``lora_A`` [r, I] and ``lora_B`` [O, r], without values."""

    def __init__(self, rank: int, inputs: int, outputs: int, like: torch.Tensor) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, dtype=like.dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, dtype=like.dtype, device=like.device))


@dataclass(frozen=True, slots=True)
class Part:
    """One of a checkpoint's layers in a layer of Megatron-Core."""

    name: str
    outputs: int
    """Of this rank."""
    adapted: bool


class AdaptedLinear(nn.Module):  # type: ignore[misc]
    """What a layer is given when it is adapted."""

    adapters: nn.ModuleDict
    """By the names of parts, in their order."""
    parts: Sequence[Part]
    order: torch.Tensor | None
    """Place of every output among those of all parts, end to end; None: they are in that order."""
    scale: float
    active: bool
    shard_dims: ClassVar[dict[str, int]]
    """Dimensions in which tensor-parallel ranks divide the parameters."""

    def adapt(self, parts: Sequence[Part], order: torch.Tensor | None, rank: int, scale: float) -> None:
        """Give the chosen ``parts`` adapters."""
        inputs = self.weight.shape[1]
        self.parts, self.order, self.scale, self.active = tuple(parts), order, scale, True
        self.adapters = nn.ModuleDict(
            {part.name: Adapter(rank, inputs, part.outputs, self.weight) for part in parts if part.adapted}
        )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def merged_weight(self) -> torch.Tensor:
        """[O, I] this rank's weight with the adapters added."""
        parts = []
        for part in self.parts:
            adapter = self.adapters[part.name] if part.adapted else None
            shape = (part.outputs, self.weight.shape[1])
            parts.append(self.weight.new_zeros(shape) if adapter is None else adapter.lora_B @ adapter.lora_A)
        delta = torch.cat(parts)
        return self.weight + self.scale * (delta if self.order is None else delta[self.order])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """As Megatron-Core's, and the adapters."""
        axes = {name: dim for name, dim in self.shard_dims.items() if name in ("weight", "bias")}
        for part in self.adapters:
            axes |= {f"adapters.{part}.{name}": dim for name, dim in self.shard_dims.items() if "lora" in name}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded

    def _up(self, down: torch.Tensor) -> torch.Tensor:
        """From all adapters' products with A, end to end, to what is added to the output."""
        downs = iter(down.split([adapter.lora_A.shape[0] for adapter in self.adapters.values()], -1))
        pieces = [
            functional.linear(next(downs), self.adapters[part.name].lora_B)
            if part.adapted
            else down.new_zeros(*down.shape[:-1], part.outputs)
            for part in self.parts
        ]
        out = torch.cat(pieces, -1) * self.scale
        return out if self.order is None else out.index_select(-1, self.order)

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, torch.cat([adapter.lora_A for adapter in self.adapters.values()]))


class AdaptedColumn(AdaptedLinear, ColumnParallelLinear):  # type: ignore[misc]
    """Ranks have outputs.  A is whole everywhere."""

    shard_dims: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0, "lora_B": 0}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(x, *args, **kwargs)
        if not self.active:
            return output, bias
        down = self._down(x)
        if self.sequence_parallel:
            down = gather_from_sequence_parallel_region(down, group=self.tp_group)
        else:
            down = copy_to_tensor_model_parallel_region(down, group=self.tp_group)
        return output + self._up(down), bias


class AdaptedNormColumn(NormColumnParallelLinear, AdaptedColumn):
    """The adapter sees what comes out of the norm."""


class AdaptedRow(AdaptedLinear, RowParallelLinear):  # type: ignore[misc]
    """Ranks have inputs.  B is whole everywhere."""

    shard_dims: ClassVar[dict[str, int]] = {"weight": 1, "lora_A": 1}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(x)
        if not self.active:
            return output, bias
        down = self._down(x)
        if self.sequence_parallel:
            down = reduce_scatter_to_sequence_parallel_region(down, group=self.tp_group)
        else:
            down = reduce_from_tensor_model_parallel_region(down, group=self.tp_group)
        return output + self._up(down), bias


ADAPTED: dict[type, type[AdaptedLinear]] = {
    ColumnParallelLinear: AdaptedColumn,
    NormColumnParallelLinear: AdaptedNormColumn,
    RowParallelLinear: AdaptedRow,
}
