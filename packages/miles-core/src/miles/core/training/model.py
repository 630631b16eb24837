"""What a backend's model does for the training procedure."""

from __future__ import annotations

from typing import Protocol

import torch

from miles.core.math.logprobs import LogProbs
from miles.core.training.micro_batch import MicroBatch


class Scorer(Protocol):
    """A frozen model.  Collective."""

    def score(self, micro_batch: MicroBatch) -> LogProbs:
        """Log-probabilities of the response tokens, without a graph."""


class Model(Protocol):
    """The model being trained, on this rank.  Every method is collective."""

    def score(self, micro_batch: MicroBatch, *, with_entropy: bool = False) -> LogProbs:
        """Log-probabilities of the response tokens, without a graph."""

    def forward(self, micro_batch: MicroBatch, *, with_entropy: bool = False) -> LogProbs:
        """Log-probabilities of the response tokens, with a graph."""

    def logits(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Logits of all tokens of all samples, end to end, divided by the temperature: [N, V] in fp32, with a graph."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradient.  ``last`` is the step's last one: gradients are summed over ranks then."""

    def step(self, learning_rate: float) -> float:
        """Update the weights with the summed gradient, clear it, and return its global norm before clipping.

        A gradient that is not finite leaves the weights as they are.
        """

    def reset_optimizer(self) -> None:
        """Forget moments and step counts."""
