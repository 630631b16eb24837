"""Which samples share a micro-batch, and which rank gets it.

Every rank holds the lengths of the whole rollout, so every rank computes the same plan and none has to ask another.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from miles.core.training.balance import karmarkar_karp

Bin = list[int]
"""Positions of the samples of one micro-batch, longest first."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How micro-batches are formed.

    ``max_tokens`` is a hard cap on the tokens of a micro-batch (only a single longer sample may exceed it); without it
    a micro-batch holds ``micro_batch_size`` samples.  ``balance`` gives every rank nearly the same number of tokens.
    """

    max_tokens: int | None = None
    micro_batch_size: int = 1
    balance: bool = False


def plan_micro_batches(lengths: Sequence[int], num_ranks: int, packing: Packing) -> list[list[Bin]]:
    """Micro-batches of each rank for the samples of one optimizer step.

    ``lengths`` are tokens per sample.  Every rank gets the same number of micro-batches, some of them empty when there
    are not enough samples to go round.
    """
    bins_of_rank = [_pack(share, lengths, packing) for share in _shares(lengths, num_ranks, packing.balance)]
    count = max(map(len, bins_of_rank))
    return [_grown(bins, count, lengths) for bins in bins_of_rank]


def _shares(lengths: Sequence[int], num_ranks: int, balance: bool) -> list[list[int]]:
    """Samples of each rank: dealt out in turn, or balanced by tokens (equal numbers of samples where possible)."""
    num_samples = len(lengths)
    if balance and num_samples >= num_ranks > 1:
        return karmarkar_karp(lengths, num_ranks, equal_size=num_samples % num_ranks == 0)
    return [list(range(rank, num_samples, num_ranks)) for rank in range(num_ranks)]


def _pack(share: Sequence[int], lengths: Sequence[int], packing: Packing) -> list[Bin]:
    if packing.max_tokens is not None:
        return best_fit_decreasing(share, lengths, packing.max_tokens)
    size = packing.micro_batch_size
    chunks = [share[start : start + size] for start in range(0, len(share), size)]
    return [_longest_first(chunk, lengths) for chunk in chunks]


def best_fit_decreasing(items: Sequence[int], lengths: Sequence[int], capacity: int) -> list[Bin]:
    """Put each item, longest first, into the bin that it fills best; open a bin where none has room.

    An item longer than ``capacity`` gets a bin of its own.
    """
    bins: list[Bin] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for item in _longest_first(items, lengths):
        at = bisect_left(room, (lengths[item], -1))
        if at < len(room):
            free, target = room.pop(at)
            bins[target].append(item)
        else:
            free, target = capacity, len(bins)
            bins.append([item])
        insort(room, (free - lengths[item], target))
    return bins


def _longest_first(items: Sequence[int], lengths: Sequence[int]) -> Bin:
    return sorted(items, key=lambda item: (-lengths[item], item))


def _grown(bins: list[Bin], count: int, lengths: Sequence[int]) -> list[Bin]:
    """Reach ``count`` bins by halving the heaviest ones; empty bins make up what cannot be halved."""
    bins = list(bins)
    while len(bins) < count:
        heaviest = max(
            (b for b in range(len(bins)) if len(bins[b]) > 1),
            key=lambda b: sum(lengths[item] for item in bins[b]),
            default=None,
        )
        if heaviest is None:
            return bins + [[] for _ in range(count - len(bins))]
        bins += _halves(bins.pop(heaviest), lengths)
    return bins


def _halves(items: Bin, lengths: Sequence[int]) -> list[Bin]:
    """Longest processing time first: each item, longest first, goes to the lighter half."""
    halves: list[Bin] = [[], []]
    totals = [0, 0]
    for item in items:
        lighter = totals[1] < totals[0]
        halves[lighter].append(item)
        totals[lighter] += lengths[item]
    return halves
