"""Which samples share a micro-batch, and which rank gets it.

Every rank holds the lengths of the whole rollout, so every rank computes the same plan and none has to ask another.
Samples with the same prompt form a family and are kept together, because a micro-batch computes a prompt once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from miles.core.training.balance import karmarkar_karp
from miles.core.training.bins import Bin, Item, Unit, fill_bins, units_of

# By how much a bin may exceed an equal share of the tokens, tried in turn.
_SLACKS = (0.002, 0.01, 0.04, 0.15, 0.5)


@dataclass(frozen=True, slots=True)
class Packing:
    """How micro-batches are formed.

    ``max_tokens`` is a hard cap on the tokens of a micro-batch (only a single longer sample may exceed it); without it
    a micro-batch holds ``micro_batch_size`` samples.  ``balance`` gives every rank nearly the same number of tokens.
    Without ``shares_prompts`` a model computes the prompt of every sample; with ``multiple`` it takes micro-batches in
    groups of so many.
    """

    max_tokens: int | None = None
    micro_batch_size: int = 1
    balance: bool = False
    shares_prompts: bool = True
    multiple: int = 1

    def shared_by(self, count: int) -> Packing:
        """The same where ``count`` ranks share a micro-batch, each with a part of every sample."""
        return self if self.max_tokens is None else replace(self, max_tokens=self.max_tokens * count)

    def rounded(self, count: int) -> int:
        """A number of micro-batches that a model takes."""
        return math.ceil(count / self.multiple) * self.multiple


def plan_micro_batches(items: Sequence[Item], num_ranks: int, packing: Packing) -> list[list[list[int]]]:
    """Samples of each micro-batch of each rank, for one optimizer step.

    Every rank gets the same number of micro-batches, some of them empty when there are not enough samples to go round.
    """
    if not packing.shares_prompts:
        items = [replace(item, family=item.sample) for item in items]
    if packing.max_tokens is None:
        return _fixed_size(items, num_ranks, packing)
    if packing.balance and num_ranks > 1:
        bins = _balanced(items, num_ranks, packing.max_tokens)
    else:
        units = _divided(units_of(items, packing.max_tokens), num_ranks)
        bins = [fill_bins(units[rank::num_ranks], packing.max_tokens) for rank in range(num_ranks)]
    count = packing.rounded(max(map(len, bins)))
    return [[_samples(chosen) for chosen in _grown(of_rank, count)] for of_rank in bins]


def _balanced(items: Sequence[Item], num_ranks: int, capacity: int) -> list[list[Bin]]:
    """Bins of each rank, all about equally full, so that no rank waits for another in any micro-batch.

    As many as ``capacity`` makes necessary, in whole rounds over the ranks.
    """
    fullest = fill_bins(units_of(items, capacity), capacity)
    count = num_ranks * math.ceil(len(fullest) / num_ranks)
    bins = _grown(_even_bins(items, fullest, count, capacity), count)
    shares = karmarkar_karp([_tokens(chosen) for chosen in bins], num_ranks, equal_size=True)
    return [sorted((bins[b] for b in share), key=_tokens, reverse=True) for share in shares]


def _even_bins(items: Sequence[Item], fullest: list[Bin], count: int, capacity: int) -> list[Bin]:
    """At most ``count`` bins of the smallest capacity that makes do with them."""
    even = sum(map(_tokens, fullest)) / count
    for slack in _SLACKS:
        tried = math.ceil(even * (1 + slack))
        if tried >= capacity:
            break
        bins = fill_bins(units_of(items, tried), tried)
        if len(bins) <= count:
            return bins
    return fullest


def _fixed_size(items: Sequence[Item], num_ranks: int, packing: Packing) -> list[list[list[int]]]:
    size = packing.micro_batch_size
    plan = []
    for share in _shares([item.prompt + item.response for item in items], num_ranks, packing.balance):
        samples = [items[i].sample for i in share]
        plan.append([samples[start : start + size] for start in range(0, len(samples), size)])
    count = packing.rounded(max(map(len, plan)))
    return [of_rank + [[] for _ in range(count - len(of_rank))] for of_rank in plan]


def _shares(weights: Sequence[int], num_ranks: int, balance: bool) -> list[list[int]]:
    """Indices of each rank: dealt out in turn, or balanced by weight (in equal numbers where possible)."""
    count = len(weights)
    if balance and count >= num_ranks > 1:
        return karmarkar_karp(weights, num_ranks, equal_size=count % num_ranks == 0)
    return [list(range(rank, count, num_ranks)) for rank in range(num_ranks)]


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
    return max(divisible, key=lambda b: _tokens(bins[b]), default=None)


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


def _tokens(units: Bin) -> int:
    return sum(unit.tokens for unit in units)


def _samples(units: Iterable[Unit]) -> list[int]:
    return [item.sample for unit in units for item in unit.items]
