"""Prompts that are already computed: the samples of a group share one computation of their prompt.

The store of a running sequence begins with its prompt's keys and values, so the sequence itself is the cache entry;
its last prompt token's hidden state is kept, from which every sample of the group draws its first token.  Whoever
changes the weights clears the table.
"""

from __future__ import annotations

import numpy as np
import torch

from miles.rollout.engines.embedded.sequence import Sequence


class PrefixTable:
    """Running sequences by the tokens they began with."""

    def __init__(self) -> None:
        self._sources: dict[bytes, Sequence] = {}
        self._states: dict[Sequence, tuple[bytes, torch.Tensor]] = {}

    @staticmethod
    def key(tokens: list[int]) -> bytes:
        """What identifies a list of tokens."""
        return np.asarray(tokens, np.int32).tobytes()

    def add(self, key: bytes, source: Sequence, hidden: torch.Tensor) -> None:
        """``source`` holds the tokens of ``key``; ``hidden`` [hidden] is the state of the last one."""
        self._sources[key] = source
        self._states[source] = (key, hidden)

    def find(self, key: bytes) -> Sequence | None:
        """A sequence that began with exactly these tokens."""
        return self._sources.get(key)

    def hidden(self, source: Sequence) -> torch.Tensor:
        """The hidden state that was added with ``source``."""
        return self._states[source][1]

    def discard(self, source: Sequence) -> None:
        """``source`` gives up its store."""
        entry = self._states.pop(source, None)
        if entry is not None and self._sources.get(entry[0]) is source:
            del self._sources[entry[0]]

    def clear(self) -> None:
        """Forget everything."""
        self._sources.clear()
        self._states.clear()
