"""Filling bins of a fixed capacity with samples, of which those with the same prompt share it.

A bin is filled with the largest unit that fits, again and again.  What then is left of it takes samples out of units
that wait: their prompt is computed once more, but an empty place would cost as much and bring nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


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


@dataclass(frozen=True)
class Unit:
    """Items of one family that stay together."""

    items: tuple[Item, ...]

    @cached_property
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


def units_of(items: Sequence[Item], capacity: int) -> list[Unit]:
    """Families, cut where they exceed ``capacity``.  The items of a unit are of descending length."""
    families: dict[int, list[Item]] = {}
    for item in items:
        families.setdefault(item.family, []).append(item)
    return [unit for family in families.values() for unit in _cut(family, capacity)]


def fill_bins(units: Iterable[Unit], capacity: int) -> list[Bin]:
    """Bins of at most ``capacity`` tokens; a single item that is larger has one of its own."""
    waiting = _Waiting(units)
    bins = []
    while (unit := waiting.take(None)) is not None:
        chosen = [unit]
        room = capacity - unit.tokens
        while room > 0 and (unit := waiting.take(room) or waiting.take_part(room)) is not None:
            chosen.append(unit)
            room -= unit.tokens
        bins.append(chosen)
    return bins


def _cut(family: list[Item], capacity: int) -> Iterable[Unit]:
    """As many items together as fit."""
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


class _Sizes:
    """Things by size.  A number whose bits are the sizes that occur finds the largest that fits."""

    def __init__(self) -> None:
        self._present = 0
        self._things: dict[int, list[int]] = {}

    def add(self, size: int, thing: int) -> None:
        things = self._things.setdefault(size, [])
        if not things:
            self._present |= 1 << size
        things.append(thing)

    def largest(self, limit: int | None) -> tuple[int, int] | None:
        """Size and thing, of at most ``limit``."""
        fitting = self._present if limit is None else self._present & ((1 << (limit + 1)) - 1)
        if not fitting:
            return None
        size = fitting.bit_length() - 1
        return size, self._things[size][-1]

    def drop(self, size: int) -> None:
        """Remove what ``largest`` found."""
        things = self._things[size]
        things.pop()
        if not things:
            self._present ^= 1 << size


class _Waiting:
    """Units that are in no bin yet."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._units: dict[int, Unit] = {}
        self._sizes = _Sizes()
        self._singles = _Sizes()
        for number, unit in enumerate(units):
            self._put(number, unit)

    def take(self, limit: int | None) -> Unit | None:
        """The largest unit of at most ``limit`` tokens."""
        while (found := self._sizes.largest(limit)) is not None:
            size, number = found
            self._sizes.drop(size)
            unit = self._units.get(number)
            if unit is not None and unit.tokens == size:  # else it has been taken, or cut since
                del self._units[number]
                return unit
        return None

    def take_part(self, limit: int) -> Unit | None:
        """Some items of a unit that is larger than ``limit``, where they are more than the prompt they repeat."""
        while (found := self._singles.largest(limit)) is not None:
            size, number = found
            unit = self._units.get(number)
            at = None if unit is None else _item_of_size(unit, size)
            if unit is None or at is None:
                self._singles.drop(size)
                continue
            part, rest = _parts(unit, at, limit)
            self._put(number, rest, with_items=False)
            return part
        return None

    def _put(self, number: int, unit: Unit, *, with_items: bool = True) -> None:
        self._units[number] = unit
        self._sizes.add(unit.tokens, number)
        if with_items and len(unit.items) > 1:
            for item in unit.items:
                if item.response >= item.prompt:
                    self._singles.add(item.prompt + item.response, number)


def _item_of_size(unit: Unit, size: int) -> int | None:
    """Position of an item that takes ``size`` tokens by itself."""
    response = size - unit.items[0].prompt
    at = bisect_right(unit.items, -response, key=lambda item: -item.response) - 1
    return at if at >= 0 and unit.items[at].response == response else None


def _parts(unit: Unit, first: int, limit: int) -> tuple[Unit, Unit]:
    """That item with what else of the unit fits beside it, and the rest, which is not empty: the unit did not fit."""
    part, rest = [unit.items[first]], list(unit.items[:first])
    room = limit - unit.items[0].prompt - unit.items[first].response
    for item in unit.items[first + 1 :]:
        if item.response <= room:
            part.append(item)
            room -= item.response
        else:
            rest.append(item)
    return Unit(tuple(part)), Unit(tuple(rest))
