"""Which samples share a micro-batch, and which rank gets it.

Every rank holds the lengths of the whole rollout, so every rank computes the same plan and none has to ask another.
Samples with the same prompt form a family and are kept together, because a micro-batch computes a prompt once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from miles.core.training.balance import karmarkar_karp


@dataclass(frozen=True, slots=True)
class Packing:
    """How micro-batches are formed.

    ``max_tokens`` is a hard cap on the tokens of a micro-batch (only a single longer sample may exceed it); without it
    a micro-batch holds ``micro_batch_size`` samples.  ``balance`` gives every rank nearly the same number of tokens.
    """

    max_tokens: int | None = None
    micro_batch_size: int = 1
    balance: bool = False

    def shared_by(self, count: int) -> Packing:
        """The same where ``count`` ranks share a micro-batch, each with a part of every sample."""
        return self if self.max_tokens is None else replace(self, max_tokens=self.max_tokens * count)


@dataclass(frozen=True, slots=True)
class Item:
    """A sample to pack."""

    sample: int
    family: int
    """Samples of one family begin with the same prompt."""
    prompt: int
    """Tokens."""
    response: int
    """Tokens."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Items of one family that stay together."""

    items: tuple[Item, ...]

    @property
    def tokens(self) -> int:
        """What they take in a pack: their prompt once."""
        return self.items[0].prompt + sum(item.response for item in self.items)

    def halves(self) -> list[Unit]:
        """Longest processing time first: each item goes to the lighter half."""
        halves: tuple[list[Item], list[Item]] = ([], [])
        totals = [0, 0]
        for item in self.items:
            lighter = totals[1] < totals[0]
            halves[lighter].append(item)
            totals[lighter] += max(item.response, 1)
        return [Unit(tuple(half)) for half in halves]


Bin = list[Unit]


def plan_micro_batches(items: Sequence[Item], num_ranks: int, packing: Packing) -> list[list[list[int]]]:
    """Samples of each micro-batch of each rank, for one optimizer step.

    Every rank gets the same number of micro-batches, some of them empty when there are not enough samples to go round.
    """
    if packing.max_tokens is None:
        return _fixed_size(items, num_ranks, packing)
    units = _divided(units_of(items, packing.max_tokens), num_ranks)
    shares = _shares([unit.tokens for unit in units], num_ranks, packing.balance)
    bins = [best_fit_decreasing([units[i] for i in share], packing.max_tokens) for share in shares]
    count = max(map(len, bins))
    return [[_samples(unit for unit in chosen) for chosen in _grown(of_rank, count)] for of_rank in bins]


def best_fit_decreasing(units: Sequence[Unit], capacity: int) -> list[Bin]:
    """Put each unit, largest first, into the bin that it fills best; open a bin where none has room.

    A unit larger than ``capacity`` gets a bin of its own.
    """
    bins: list[Bin] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for unit in sorted(units, key=lambda unit: (-unit.tokens, unit.items[0].sample)):
        at = bisect_left(room, (unit.tokens, -1))
        if at < len(room):
            free, target = room.pop(at)
            bins[target].append(unit)
        else:
            free, target = capacity, len(bins)
            bins.append([unit])
        insort(room, (free - unit.tokens, target))
    return bins


def _fixed_size(items: Sequence[Item], num_ranks: int, packing: Packing) -> list[list[list[int]]]:
    size = packing.micro_batch_size
    plan = []
    for share in _shares([item.prompt + item.response for item in items], num_ranks, packing.balance):
        samples = [items[i].sample for i in share]
        plan.append([samples[start : start + size] for start in range(0, len(samples), size)])
    count = max(map(len, plan))
    return [of_rank + [[] for _ in range(count - len(of_rank))] for of_rank in plan]


def _shares(weights: Sequence[int], num_ranks: int, balance: bool) -> list[list[int]]:
    """Indices of each rank: dealt out in turn, or balanced by weight (in equal numbers where possible)."""
    count = len(weights)
    if balance and count >= num_ranks > 1:
        return karmarkar_karp(weights, num_ranks, equal_size=count % num_ranks == 0)
    return [list(range(rank, count, num_ranks)) for rank in range(num_ranks)]


def units_of(items: Sequence[Item], capacity: int) -> list[Unit]:
    """Families, cut where they exceed ``capacity``."""
    families: dict[int, list[Item]] = {}
    for item in items:
        families.setdefault(item.family, []).append(item)
    return [unit for family in families.values() for unit in _cut(family, capacity)]


def _cut(family: list[Item], capacity: int) -> Iterable[Unit]:
    """Items of one family by descending length, as many together as fit."""
    family = sorted(family, key=lambda item: (-item.response, item.sample))
    chosen: list[Item] = []
    room = capacity - family[0].prompt
    for item in family:
        if chosen and item.response > room:
            yield Unit(tuple(chosen))
            chosen, room = [], capacity - item.prompt
        chosen.append(item)
        room -= item.response
    yield Unit(tuple(chosen))


def _divided(units: list[Unit], num_ranks: int) -> list[Unit]:
    """Halve the largest units until every rank can have one."""
    units = list(units)
    while len(units) < num_ranks:
        largest = _largest([[unit] for unit in units])
        if largest is None:
            break
        units[largest : largest + 1] = units[largest].halves()
    return units


def _grown(bins: list[Bin], count: int) -> list[Bin]:
    """Reach ``count`` bins by halving the fullest ones; empty bins make up what cannot be halved."""
    bins = list(bins)
    while len(bins) < count:
        largest = _largest(bins)
        if largest is None:
            return bins + [[] for _ in range(count - len(bins))]
        bins += _halves(bins.pop(largest))
    return bins


def _largest(bins: Sequence[Bin]) -> int | None:
    """The fullest bin of more than one sample."""
    divisible = [b for b in range(len(bins)) if sum(len(unit.items) for unit in bins[b]) > 1]
    return max(divisible, key=lambda b: sum(unit.tokens for unit in bins[b]), default=None)


def _halves(units: Bin) -> list[Bin]:
    """Two bins of about equal size; a family is cut only where it is alone."""
    if len(units) == 1:
        return [[half] for half in units[0].halves()]
    halves: tuple[Bin, Bin] = ([], [])
    totals = [0, 0]
    for unit in sorted(units, key=lambda unit: (-unit.tokens, unit.items[0].sample)):
        lighter = totals[1] < totals[0]
        halves[lighter].append(unit)
        totals[lighter] += unit.tokens
    return list(halves)


def _samples(units: Iterable[Unit]) -> list[int]:
    return [item.sample for unit in units for item in unit.items]
