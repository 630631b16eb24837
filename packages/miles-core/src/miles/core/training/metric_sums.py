"""Metrics of an optimizer step: sums over micro-batches and ranks, divided once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from miles.core.training.loss_batch import LossOutput

AllReduce = Callable[[torch.Tensor], torch.Tensor]
"""Adds a tensor over all ranks that hold samples or parts of samples, and returns the sum."""


def single_rank(x: torch.Tensor) -> torch.Tensor:
    """The ``AllReduce`` of a job with one rank."""
    return x


class MetricSums:
    """Adds up the metrics of micro-batches; the result does not depend on how samples were packed or distributed.

    Every rank must have added at least one micro-batch, be it empty, or have been told what to ``expect``, so that all
    know the same names.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, torch.Tensor] = {}
        self._samples: dict[str, torch.Tensor] = {}

    def add(self, output: LossOutput) -> None:
        """Add one micro-batch."""
        for sums, new in ((self._tokens, output.token_metrics), (self._samples, output.sample_metrics)):
            for name, value in new.items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of the metrics per token, and of those per sample."""
        return tuple(self._tokens), tuple(self._samples)

    def expect(self, tokens: Sequence[str], samples: Sequence[str], *, device: torch.device) -> None:
        """Take part in ``means`` with zeros for what was never added here."""
        for sums, names in ((self._tokens, tokens), (self._samples, samples)):
            for name in names:
                sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=device))

    def means(self, *, denominator: float, num_samples: int, all_reduce: AllReduce = single_rank) -> dict[str, float]:
        """Averages over the step.

        ``denominator`` is ``Objective.denominator`` and ``num_samples`` the number of samples of the whole step, over
        all ranks.  One collective, whatever the number of metrics.
        """
        names = [*self._tokens, *self._samples]
        sums = torch.stack([*self._tokens.values(), *self._samples.values()])
        divisors = [denominator] * len(self._tokens) + [float(num_samples)] * len(self._samples)
        return {name: value / by for name, value, by in zip(names, all_reduce(sums).tolist(), divisors, strict=True)}
