"""How calls ended."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import repeat
from operator import add
from typing import Any, Literal, NamedTuple, overload

Status = Literal["ok", "timeout", "crash", "error"]

Ending = tuple[Status, Any, str]
"""Status, value and detail: what many calls have in common."""


class Result(NamedTuple):
    """How one call ended.  Exactly one of these comes back for every call."""

    status: Status
    value: Any = None
    """What the function returned (plain JSON data); None unless ``status`` is ``ok``."""
    detail: str = ""
    """Why there is no value, in one line."""
    seconds: float = 0.0
    """Time the call took in its worker, without waiting."""


_new = tuple.__new__  # a third of the time of Result(...)
_PENDING: Ending = ("error", None, "not called yet")


class Results(Sequence[Result]):
    """Results in the order of the calls, made when somebody looks at them.

    To keep an object for every call would cost more time, that of garbage collections, than all else the pool does.
    """

    __slots__ = ("_endings", "_seconds")

    def __init__(self, endings: list[Ending], seconds: array[float]) -> None:
        """Of as many calls as each of both has entries."""
        self._endings = endings
        self._seconds = seconds

    @classmethod
    def pending(cls, size: int) -> Results:
        """Of ``size`` calls that have not ended."""
        return cls([_PENDING] * size, array("f", bytes(4 * size)))

    def __len__(self) -> int:
        return len(self._endings)

    def __iter__(self) -> Iterator[Result]:
        return map(_new, repeat(Result), map(add, self._endings, zip(self._seconds)))

    @overload
    def __getitem__(self, place: int) -> Result: ...

    @overload
    def __getitem__(self, place: slice) -> Results: ...

    def __getitem__(self, place: int | slice) -> Result | Results:
        if isinstance(place, slice):
            return Results(self._endings[place], self._seconds[place])
        return Result(*self._endings[place], seconds=self._seconds[place])

    @property
    def total_s(self) -> float:
        """What the calls took together."""
        return sum(self._seconds)

    def put(self, start: int, results: Results) -> None:
        """Note those of the calls from number ``start`` on."""
        stop = start + len(results)
        self._endings[start:stop] = results._endings
        self._seconds[start:stop] = results._seconds

    def fill(self, result: Result) -> None:
        """Let ``result`` be that of all calls that have none."""
        ending = result[:3]
        self._endings = [ending if known is _PENDING else known for known in self._endings]


def single(result: Result) -> Results:
    """Of one call."""
    return Results([result[:3]], array("f", (result.seconds,)))
