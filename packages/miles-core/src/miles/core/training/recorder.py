"""What a model says of its samples, collected from micro-batches into columns of the whole rollout.

T = response tokens of one micro-batch, A = response tokens of the rollout.
"""

from __future__ import annotations

from typing import Any

import torch

from miles.core.training.columns import Columns
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.model import Output
from miles.core.training.ranks import Ranks


class Recorder:
    """Takes a model's output micro-batch by micro-batch.  ``output`` is what the model is asked for."""

    def __init__(self, columns: Columns, ranks: Ranks, output: Output) -> None:
        self.output = output
        self._ranks = ranks
        self.own_A = torch.zeros_like(columns.mask_A)
        """Log-probabilities or values of this rank's samples, 0 for those of others."""
        self._entropy_A = torch.zeros_like(columns.mask_A) if output == "entropy" else None

    def add(self, micro_batch: MicroBatch, output: Any) -> None:
        """Keep ``output``: ``LogProbs``, or values [T].  Logits are not kept."""
        if self.output == "logits":
            return
        main_T = output if self.output == "values" else output.logp_T
        self.own_A.index_copy_(0, micro_batch.columns_T, main_T.detach())
        if self._entropy_A is not None:
            self._entropy_A.index_copy_(0, micro_batch.columns_T, output.entropy_T.detach())

    def everyones(self) -> torch.Tensor:
        """Log-probabilities or values of all samples.  Collective, once."""
        return self._ranks.sum(self.own_A)

    def entropy(self) -> torch.Tensor | None:
        """Entropies of all samples, where they were asked for.  Collective, once."""
        return None if self._entropy_A is None else self._ranks.sum(self._entropy_A)
