"""Keys and values of the running sequences.

A sequence lives in one slot of one pool.  All slots of a pool hold the same number of tokens, and the used slots are
the first ones, so a decoding step reads a pool as a plain slice, without gathering.  A sequence that outgrows its slot
moves to the pool of twice the size: memory stays within twice of what is used, and short sequences do not pay for the
attention of long ones.

Where routed experts are to be returned, their numbers are kept beside keys and values: they belong to a token like
these, and are copied with a prefix.

L = layers, S = slots, K = key-value heads, T = tokens of a slot, D = head dimension, A = experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Store = npt.NDArray[Any]
Owner = TypeVar("Owner")

TOKEN_MULTIPLE = 32
"""Attention reads keys in multiples of this: masked zeros at the end then change no partial sum."""
_NUMBER_BYTES = 4
_SMALLEST_SLOT = 64
_FEWEST_SLOTS = 8


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token stores: float32 numbers, whatever the model's precision (see attention.py)."""

    num_layers: int
    num_heads: int
    key_dim: int
    value_dim: int
    experts_per_token: int = 0
    """A; 0: routed experts are not kept."""

    @property
    def token_bytes(self) -> int:
        """Bytes that one token stores in all layers."""
        numbers = self.num_heads * (self.key_dim + self.value_dim) + self.experts_per_token
        return self.num_layers * numbers * _NUMBER_BYTES


@dataclass(slots=True, eq=False)
class Pool(Generic[Owner]):
    """Slots of ``capacity`` tokens each."""

    shape: KVShape
    capacity: int
    owners: list[Owner] = field(default_factory=list)
    """Who uses slot i."""
    reserved: int = 0
    """Slots behind the used ones that are promised to someone."""
    keys: Floats = field(init=False)
    """[L, S, K, T, D]: what attention reads at once lies together."""
    values: Floats = field(init=False)
    """[L, S, K, T, D]"""
    experts: npt.NDArray[np.int32] = field(init=False)
    """[L, S, 1, T, A]"""

    def __post_init__(self) -> None:
        self.keys, self.values, self.experts = self._storage(0)

    @property
    def stores(self) -> tuple[Store, ...]:
        """Everything that is kept per token, each [L, S, ..., T, ...]."""
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

    def write(self, layer: int, slots: slice, positions: Ints, keys: Floats, values: Floats) -> None:
        """Store ``keys`` and ``values`` [N x Q, K, D] of ``slots`` at ``positions`` [N, Q]."""
        _put(self.keys[layer, slots], positions, keys)
        _put(self.values[layer, slots], positions, values)

    def write_experts(self, layer: int, slots: slice, positions: Ints, chosen: Store) -> None:
        """Store the experts ``chosen`` [N x Q, A] of ``slots`` at ``positions`` [N, Q]."""
        _put(self.experts[layer, slots], positions, chosen[:, None])

    def read_experts(self, slot: int, num_tokens: int) -> npt.NDArray[np.int32]:
        """A copy [num_tokens, L, A] of the experts of a slot's first tokens."""
        return np.ascontiguousarray(self.experts[:, slot, 0, :num_tokens].swapaxes(0, 1))

    def read(self, layer: int, slots: slice, num_tokens: int) -> tuple[Floats, Floats]:
        """Keys and values [N, K, num_tokens, D] of ``slots``; views."""
        return self.keys[layer, slots, :, :num_tokens], self.values[layer, slots, :, :num_tokens]

    def _storage(self, num_slots: int) -> tuple[Floats, Floats, npt.NDArray[np.int32]]:
        # Zeros, not uninitialized memory: a masked weight of 0 times a NaN would be a NaN.
        shape = self.shape
        size = (shape.num_layers, num_slots, shape.num_heads, self.capacity)
        return (
            np.zeros((*size, shape.key_dim), np.float32),
            np.zeros((*size, shape.value_dim), np.float32),
            np.zeros((shape.num_layers, num_slots, 1, self.capacity, shape.experts_per_token), np.int32),
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
            for there, here in zip(target.stores, source.stores, strict=True):
                for old, new in pairs:
                    there[:, new, :, :span] = here[:, old, :, :span]

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


def _put(store: Store, positions: Ints, rows: Store) -> None:
    """Write ``rows`` [N x Q, K, D] to ``positions`` [N, Q] of ``store`` [N, K, T, D]."""
    store[np.arange(len(positions))[:, None], :, positions] = rows.reshape(*positions.shape, *rows.shape[1:])
