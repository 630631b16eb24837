"""How the tensors of a Hugging Face checkpoint make up one parameter of Megatron-Core, and how that is divided.

Every layout is a bijection: ``split(join(tensors)) == tensors`` and ``gather(shards) == full``, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = list[torch.Tensor]


class Layout(Protocol):
    """Joins and splits whole tensors; cuts and gathers what tensor-parallel ranks hold."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole parameter."""

    def split(self, full: torch.Tensor) -> Tensors:
        """The checkpoint's tensors."""

    def shard(self, full: torch.Tensor, rank: int, count: int) -> torch.Tensor:
        """What ``rank`` of ``count`` holds of the whole parameter."""

    def gather(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole parameter from what all ranks hold."""


class Replicated:
    """The same tensor, whole on every rank."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return tensor

    def split(self, full: torch.Tensor) -> Tensors:
        return [full]

    def shard(self, full: torch.Tensor, rank: int, count: int) -> torch.Tensor:
        return full

    def gather(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0]


@dataclass(frozen=True, slots=True)
class Sharded(Replicated):
    """The same tensor, in equal parts along ``dim``."""

    dim: int

    def shard(self, full: torch.Tensor, rank: int, count: int) -> torch.Tensor:
        return full.chunk(count, self.dim)[rank]

    def gather(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards), self.dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary(Sharded):
    """Rows of tokens, and rows of zeros that make them divide among ranks."""

    size: int
    """Tokens."""
    padded: int
    """Tokens and padding."""
    dim: int = 0

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        if self.padded == self.size:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(self.padded - self.size, *tensor.shape[1:])])

    def split(self, full: torch.Tensor) -> Tensors:
        return [full[: self.size]]


class Gated(Replicated):
    """Gate and up projection, one after the other; a rank holds its rows of both."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def split(self, full: torch.Tensor) -> Tensors:
        return list(full.chunk(2))

    def shard(self, full: torch.Tensor, rank: int, count: int) -> torch.Tensor:
        return torch.cat([half.chunk(count)[rank] for half in full.chunk(2)])

    def gather(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])


class PackedGated(Gated):
    """Gate and up projection that are one tensor in the checkpoint too."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return tensor

    def split(self, full: torch.Tensor) -> Tensors:
        return [full]


class InterleavedGated(Gated):
    """Gate and up projection in the columns of one tensor, by turns; or their biases."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return torch.cat([tensor.t()[0::2], tensor.t()[1::2]])

    def split(self, full: torch.Tensor) -> Tensors:
        return [torch.stack(full.chunk(2), 1).flatten(0, 1).t()]


@dataclass(frozen=True, slots=True)
class Transposed(Sharded):
    """The transposed tensor, in equal parts along ``dim`` of the parameter."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return tensor.t()

    def split(self, full: torch.Tensor) -> Tensors:
        return [full.t()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Qkv(Sharded):
    """Query, key and value projection, group by group: a group's query heads, its key head, its value head."""

    heads: int
    groups: int
    head_dim: int
    dim: int = 0

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = [tensor.reshape(self.groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(parts, 1).flatten(0, 1)

    def split(self, full: torch.Tensor) -> Tensors:
        queries = self.heads // self.groups * self.head_dim
        sizes = [queries, self.head_dim, self.head_dim]
        parts = full.reshape(self.groups, sum(sizes), *full.shape[1:]).split(sizes, 1)
        return [part.flatten(0, 1) for part in parts]


REPLICATED = Replicated()
ROWS = Sharded(0)
COLUMNS = Sharded(1)
GATED = Gated()
PACKED_GATED = PackedGated()
INTERLEAVED_GATED = InterleavedGated()
