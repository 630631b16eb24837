"""What a backend's model does for the training procedure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch

from miles.core.math.logprobs import LogProbs
from miles.core.training.micro_batch import MicroBatch

Output = Literal["logprobs", "entropy", "logits", "values"]
"""What of a model's output is wanted: ``LogProbs`` of the response tokens, those with entropies, logits of all tokens
of all samples, end to end, divided by the temperature: [N, V] in fp32, or a critic's values of the response tokens:
[T] in fp32."""

StepLoss = Callable[[int, Any], torch.Tensor]
"""Loss of one micro-batch of an optimizer step, from its number and the model's output on it: a scalar with a graph."""


class Scorer(Protocol):
    """A frozen model.  Collective."""

    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False) -> list[LogProbs]:
        """Log-probabilities of the response tokens of each micro-batch, without a graph."""


class Trainable(Protocol):
    """A model being trained, on this rank.  Every method is collective."""

    def accumulate(self, micro_batches: Sequence[MicroBatch], output: Output, loss: StepLoss) -> None:
        """Forward and backward passes over all micro-batches of an optimizer step, in whatever order suits the model.

        ``loss`` is called once per micro-batch, on the ranks that have the model's output (see ``Ranks.has_output``).
        The gradient is that of the sum of the losses, over micro-batches and data-parallel ranks.
        """

    def step(self, learning_rate: float) -> float:
        """Update the weights with the summed gradient, clear it, and return its global norm before clipping.

        A gradient that is not finite leaves the weights as they are.
        """

    def drop_gradient(self) -> None:
        """Clear the summed gradient without an update."""

    def reset_optimizer(self) -> None:
        """Forget moments and step counts."""


class Model(Scorer, Trainable, Protocol):
    """The actor's model."""


class ValueModel(Trainable, Protocol):
    """The critic's model."""

    def values(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Values of the response tokens of each micro-batch, [T] in fp32, without a graph."""
