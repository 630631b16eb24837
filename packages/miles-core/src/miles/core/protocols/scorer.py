"""An engine's arithmetic inside the trainer's process (``--true-on-policy-mode``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from miles.core.types.batch import Floats, Ints

if TYPE_CHECKING:
    import torch


class EngineScorer(Protocol):
    """Gives the log-probabilities that an engine reports while it generates, to the bit.

    ``miles.engine_scorers`` entry points have the name of an engine, and name a class that takes the ``Config``.
    """

    def take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hold these weights from now on, as an engine takes them in an update."""

    def score(self, tokens: Sequence[Ints], response_lengths: Sequence[int]) -> list[Floats]:
        """[R] of each sample, the log-probability of each token of its response."""
