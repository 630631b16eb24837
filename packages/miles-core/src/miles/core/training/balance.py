"""Karmarkar-Karp: split weights into sets of nearly equal sums (largest differencing method)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Set:
    total: int = 0
    items: list[int] = field(default_factory=list)

    def absorb(self, other: _Set) -> None:
        self.total += other.total
        self.items += other.items


@dataclass(slots=True)
class _State:
    """One partial solution: its sets by descending sum."""

    sets: list[_Set]

    @property
    def spread(self) -> int:
        return self.sets[0].total - self.sets[-1].total

    def merge(self, other: _State) -> None:
        """Join the heaviest set of one with the lightest of the other, the next with the next, and so on."""
        for mine, theirs in zip(self.sets, reversed(other.sets), strict=True):
            mine.absorb(theirs)
        self.sets.sort(key=lambda s: (-s.total, s.items))


def karmarkar_karp(weights: Sequence[int], num_sets: int, *, equal_size: bool = False) -> list[list[int]]:
    """Partition the indices of ``weights`` into ``num_sets`` non-empty sets of nearly equal sums.

    With ``equal_size`` every set has the same number of items.  Indices are ascending inside a set, and the order of
    the sets is deterministic.  Raises ValueError when there are fewer items than sets, or equal sizes are impossible.
    """
    if len(weights) < num_sets:
        raise ValueError(f"cannot split {len(weights)} items into {num_sets} non-empty sets")
    if equal_size and len(weights) % num_sets:
        raise ValueError(f"{len(weights)} items cannot be split into {num_sets} sets of equal size")
    heap = [(-state.spread, order, state) for order, state in enumerate(_initial_states(weights, num_sets, equal_size))]
    heapq.heapify(heap)
    order = len(heap)
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        first.merge(second)
        heapq.heappush(heap, (-first.spread, order, first))
        order += 1
    return _without_empty_sets([sorted(s.items) for s in heap[0][2].sets], weights)


def _initial_states(weights: Sequence[int], num_sets: int, equal_size: bool) -> list[_State]:
    heaviest_first = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    size = num_sets if equal_size else 1
    states = []
    for start in range(0, len(weights), size):
        block = heaviest_first[start : start + size]
        sets = [_Set(weights[i], [i]) for i in block]
        states.append(_State(sets + [_Set() for _ in range(num_sets - len(sets))]))
    return states


def _without_empty_sets(sets: list[list[int]], weights: Sequence[int]) -> list[list[int]]:
    """Give each empty set (weights of zero leave them) the lightest item of the fullest set."""
    for empty in (s for s in sets if not s):
        donor = max(sets, key=len)
        lightest = min(donor, key=lambda i: (weights[i], i))
        donor.remove(lightest)
        empty.append(lightest)
    return sets
