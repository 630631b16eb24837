"""Keys and values of the running sequences.

A sequence lives in one slot of one pool.  All slots of a pool hold the same number of tokens, and the used slots are
the first ones, so a decoding step reads a pool as a plain slice, without gathering.  A sequence that outgrows its slot
moves to the pool of twice the size: memory stays within twice of what is used, and short sequences do not pay for the
attention of long ones.

Where routed experts are to be returned, their numbers are kept beside keys and values: they belong to a token like
these, and are copied with a prefix.

L = layers, S = slots, T = tokens of a slot, W = key-value heads x head dimension, A = experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

Owner = TypeVar("Owner")

TOKEN_MULTIPLE = 32
"""Attention reads keys in multiples of this: masked zeros at the end then change no partial sum."""
_EXPERT_BYTES = 4
_SMALLEST_SLOT = 64
_FEWEST_SLOTS = 8


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token stores."""

    num_layers: int
    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    experts_per_token: int = 0
    """A; 0: routed experts are not kept."""

    @property
    def token_bytes(self) -> int:
        """Bytes that one token stores in all layers."""
        attention = self.num_heads * (self.key_dim + self.value_dim) * int(self.dtype.itemsize)
        return self.num_layers * (attention + self.experts_per_token * _EXPERT_BYTES)


@dataclass(slots=True, eq=False)
class Pool(Generic[Owner]):
    """Slots of ``capacity`` tokens each."""

    shape: KVShape
    capacity: int
    owners: list[Owner] = field(default_factory=list)
    """Who uses slot i."""
    reserved: int = 0
    """Slots behind the used ones that are promised to someone."""
    keys: torch.Tensor = field(init=False)
    """[L, S, T, W]"""
    values: torch.Tensor = field(init=False)
    """[L, S, T, W]"""
    experts: torch.Tensor = field(init=False)
    """[L, S, T, A] int32"""

    def __post_init__(self) -> None:
        self.keys, self.values, self.experts = self._storage(0)

    @property
    def stores(self) -> tuple[torch.Tensor, ...]:
        """Everything that is kept per token, each [L, S, T, ...]."""
        return (self.keys, self.values, self.experts)

    @property
    def num_slots(self) -> int:
        """Allocated slots, used or not."""
        return int(self.keys.shape[1])

    @property
    def num_needed(self) -> int:
        """Slots that are used or promised."""
        return len(self.owners) + self.reserved

    @property
    def num_tokens(self) -> int:
        """Allocated tokens."""
        return self.num_slots * self.capacity

    def resize(self, num_slots: int) -> None:
        """Reallocate to ``num_slots``, which must hold all used ones."""
        used = len(self.owners)
        stores = self._storage(num_slots)
        for new, old in zip(stores, self.stores, strict=True):
            new[:, :used] = old[:, :used]
        self.keys, self.values, self.experts = stores

    def write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store ``keys`` and ``values`` [N, heads, dim] at ``index`` [N] = slot x capacity + position."""
        self.keys[layer].view(self.num_tokens, -1).index_copy_(0, index, keys.flatten(1))
        self.values[layer].view(self.num_tokens, -1).index_copy_(0, index, values.flatten(1))

    def write_experts(self, layer: int, index: torch.Tensor, chosen: torch.Tensor) -> None:
        """Store the experts ``chosen`` [N, A] at ``index`` [N] = slot x capacity + position."""
        self.experts[layer].view(self.num_tokens, -1).index_copy_(0, index, chosen.to(torch.int32))

    def read_experts(self, slot: int, num_tokens: int) -> torch.Tensor:
        """A copy [num_tokens, L, A] of the experts of a slot's first tokens."""
        return self.experts[:, slot, :num_tokens].transpose(0, 1).contiguous()

    def read(self, layer: int, first: int, count: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [count, heads, num_tokens, dim] of the slots from ``first``; views."""
        heads = self.shape.num_heads
        keys = self.keys[layer, first : first + count, :num_tokens]
        values = self.values[layer, first : first + count, :num_tokens]
        return (
            keys.view(count, num_tokens, heads, -1).transpose(1, 2),
            values.view(count, num_tokens, heads, -1).transpose(1, 2),
        )

    def _storage(self, num_slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Zeros, not uninitialized memory: a masked weight of 0 times a NaN would be a NaN.
        shape = self.shape
        size = (shape.num_layers, num_slots, self.capacity)
        with torch.inference_mode(False):  # slots are also moved between steps
            return (
                torch.zeros(*size, shape.num_heads * shape.key_dim, dtype=shape.dtype),
                torch.zeros(*size, shape.num_heads * shape.value_dim, dtype=shape.dtype),
                torch.zeros(*size, shape.experts_per_token, dtype=torch.int32),
            )


class KVCache(Generic[Owner]):
    """The pools, smallest slots first, within a budget of tokens.

    The cache does not know what an owner is; it reports every move, and the caller keeps track.
    """

    def __init__(self, shape: KVShape, context_length: int, budget_tokens: int) -> None:
        self.shape = shape
        longest = -(-context_length // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        capacities = []
        capacity = min(_SMALLEST_SLOT, longest)
        while capacity < longest:
            capacities.append(capacity)
            capacity *= 2
        self.pools: tuple[Pool[Owner], ...] = tuple(Pool(shape, size) for size in (*capacities, longest))
        self.budget_tokens = budget_tokens

    def pool_for(self, num_tokens: int) -> Pool[Owner]:
        """The smallest slots that hold ``num_tokens``."""
        return next(pool for pool in self.pools if pool.capacity >= num_tokens)

    def fits_alone(self, num_tokens: int) -> bool:
        """Whether a sequence of ``num_tokens`` fits when it is the only one."""
        return num_tokens <= self.pools[-1].capacity and self.pool_for(num_tokens).capacity <= self.budget_tokens

    @property
    def allocated_tokens(self) -> int:
        return sum(pool.num_tokens for pool in self.pools)

    @property
    def used_tokens(self) -> int:
        """Tokens of the used slots."""
        return sum(len(pool.owners) * pool.capacity for pool in self.pools)

    def reserve(self, pool: Pool[Owner], count: int) -> bool:
        """Promise ``count`` more slots of ``pool`` to the caller; False when the budget does not allow it."""
        needed = pool.num_needed + count
        if needed > pool.num_slots:
            if self._others(pool) + needed * pool.capacity > self.budget_tokens:
                self.trim()
            affordable = (self.budget_tokens - self._others(pool)) // pool.capacity
            if needed > affordable:
                return False
            pool.resize(min(max(needed, 2 * pool.num_slots, _FEWEST_SLOTS), affordable))
        pool.reserved += count
        return True

    def place(self, pool: Pool[Owner], owner: Owner) -> int:
        """Use one promised slot; returns which."""
        pool.reserved -= 1
        pool.owners.append(owner)
        return len(pool.owners) - 1

    def copy(self, moves: Seq[tuple[Pool[Owner], int, Pool[Owner], int]], num_tokens: int) -> None:
        """Copy the first ``num_tokens`` tokens of slots: (pool, slot) to (pool, slot).  No slot is both."""
        for (source, target), pairs in _by_pools(moves):
            span = min(num_tokens, source.capacity, target.capacity)
            old, new = (torch.tensor(slots) for slots in zip(*pairs, strict=True))
            for there, here in zip(target.stores, source.stores, strict=True):
                there[:, new, :span] = here[:, old, :span]

    def release(self, pool: Pool[Owner], slots: Seq[int], num_tokens: int) -> list[int]:
        """Free ``slots`` and fill the holes with the last sequences.  Returns the slots whose owners are new."""
        freed = set(slots)
        remaining = len(pool.owners) - len(freed)
        holes = sorted(slot for slot in freed if slot < remaining)
        movers = [slot for slot in range(remaining, len(pool.owners)) if slot not in freed]
        if holes:
            self.copy([(pool, mover, pool, hole) for mover, hole in zip(movers, holes, strict=True)], num_tokens)
        for mover, hole in zip(movers, holes, strict=True):
            pool.owners[hole] = pool.owners[mover]
        del pool.owners[remaining:]
        return holes

    def trim(self) -> None:
        """Give the memory of unused slots back."""
        for pool in self.pools:
            if pool.num_slots > pool.num_needed:
                pool.resize(pool.num_needed)

    def _others(self, pool: Pool[Owner]) -> int:
        return sum(other.num_tokens for other in self.pools if other is not pool)


def _by_pools(
    moves: Seq[tuple[Pool[Owner], int, Pool[Owner], int]],
) -> Iterator[tuple[tuple[Pool[Owner], Pool[Owner]], list[tuple[int, int]]]]:
    groups: dict[tuple[int, int], tuple[tuple[Pool[Owner], Pool[Owner]], list[tuple[int, int]]]] = {}
    for source, old, target, new in moves:
        groups.setdefault((id(source), id(target)), ((source, target), []))[1].append((old, new))
    yield from groups.values()
