"""Packed ragged data: the tokens of several samples, one sample after another.

S = samples, T = tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch


class Ragged:
    """Where each sample's tokens lie in a packed tensor.

    ``lengths`` are tokens per sample and may be 0.  Sums are deterministic and differentiable.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(int(length) for length in lengths)
        self.device = torch.device(device)

    def __repr__(self) -> str:
        return f"Ragged(samples={self.num_samples}, tokens={self.num_tokens})"

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def lengths_S(self) -> torch.Tensor:
        """``lengths`` as int64."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    @cached_property
    def sample_of_token_T(self) -> torch.Tensor:
        """Index of the sample that a token belongs to."""
        samples = np.repeat(np.arange(self.num_samples), self.lengths)
        return torch.from_numpy(samples).to(self.device)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of each sample's tokens: [T, ...] -> [S, ...]."""
        if not self.num_tokens:
            return x.sum() + x.new_zeros((self.num_samples, *x.shape[1:]))
        # ``unsafe`` skips a check of the lengths that would synchronize the device; they are right by construction.
        return torch.segment_reduce(x, "sum", lengths=self.lengths_S, axis=0, unsafe=True)

    def spread(self, x_S: torch.Tensor) -> torch.Tensor:
        """Give each token the value of its sample: [S] -> [T]."""
        return x_S.index_select(0, self.sample_of_token_T)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One view per sample."""
        return list(x.split(self.lengths))
