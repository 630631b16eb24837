"""An engine's arithmetic inside the trainer's process (``--true-on-policy-mode``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from miles.core.types.batch import Floats, Ints

if TYPE_CHECKING:
    import torch

    from miles.core.weights.adapter_form import AdapterForm


class EngineScorer(Protocol):
    """Gives the log-probabilities that an engine reports while it generates, to the bit.

    ``miles.engine_scorers`` entry points have the name of an engine, and name a class that takes the ``Config``.
    """

    def facts(self) -> dict[str, Any]:
        """What the engine would tell of itself (``/server_info``), as far as it says which adapters it can add."""

    def take(self, weights: Iterable[tuple[str, torch.Tensor]], adapter: AdapterForm | None = None) -> None:
        """Hold these weights from now on, or this ``adapter``'s, as an engine takes them in an update."""

    def score(self, tokens: Sequence[Ints], response_lengths: Sequence[int]) -> list[Floats]:
        """[R] of each sample, the log-probability of each token of its response."""
