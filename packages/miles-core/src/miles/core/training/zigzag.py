"""Which context-parallel rank holds which token of a pack.

Every piece (a prompt, a response) is cut into two chunks per rank, and a rank gets one from the front and the one that
mirrors it: since a token attends to all before it, every rank has the same work.

P = tokens of the pack, W = tokens of each rank, all ranks alike; those beyond a rank's own are padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from miles.core.types.batch import Ints


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a pack, and the chunks that each rank holds of them."""

    start: int
    length: int
    spans: tuple[tuple[tuple[int, int], ...], ...]
    """Of each rank: (begin, end) inside the piece, ascending and not empty."""


class ZigZag:
    """A pack divided over ``count`` ranks.  ``pieces`` are (begin, tokens), and cover it without overlap.

    No rank holds more than ``ceil(P / count)`` tokens, so that ``count`` times a rank's limit is the pack's.
    """

    def __init__(self, pieces: Iterable[tuple[int, int]], count: int) -> None:
        self._count = count
        held = [0] * count
        self._pieces = {start: Piece(start, length, _dealt(length, held)) for start, length in pieces}
        self.width = max(held)

    def piece(self, start: int) -> Piece:
        """The piece that begins at ``start``."""
        return self._pieces[start]

    def tokens(self, rank: int) -> Ints:
        """The rank's own tokens, in the order it holds them."""
        ranges = [
            np.arange(piece.start + begin, piece.start + end)
            for piece in self._pieces.values()
            for begin, end in piece.spans[rank]
        ]
        return np.concatenate([*ranges, np.zeros(0, np.int64)]).astype(np.int64)

    @cached_property
    def gathered(self) -> Ints:
        """[P] place of each token when the W of every rank lie end to end."""
        own = [self.tokens(rank) for rank in range(self._count)]
        places = np.empty(sum(map(len, own)), np.int64)
        for rank, tokens in enumerate(own):
            places[tokens] = rank * self.width + np.arange(len(tokens))
        return places


def _dealt(length: int, held: list[int]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Chunks of each rank.  Pairs differ by one token at most; the longer ones go to the ranks that hold less."""
    count = len(held)
    sizes = [length // count + (pair < length % count) for pair in range(count)]
    spans: list[tuple[tuple[int, int], ...]] = [()] * count
    by_load = sorted(range(count), key=lambda rank: (held[rank], rank))
    for rank, pair, chunks in zip(by_load, range(count), _mirrored(sizes), strict=True):
        spans[rank] = chunks
        held[rank] += sizes[pair]
    return tuple(spans)


def _mirrored(sizes: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """A chunk from the front and one from the back for every size; those that touch are one."""
    front, back = 0, sum(sizes)
    for size in sizes:
        head, tail = (size + 1) // 2, size // 2
        chunks = [(front, front + head), (back - tail, back)]
        front, back = front + head, back - tail
        if chunks[0][1] == chunks[1][0]:
            chunks = [(chunks[0][0], chunks[1][1])]
        yield tuple(chunk for chunk in chunks if chunk[0] < chunk[1])
