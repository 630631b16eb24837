"""What goes into the objective beside the model's output, and what comes out.

S = samples of one micro-batch, T = their response tokens, packed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from miles.core.math.masked_importance import Tokens
from miles.core.math.ragged import Ragged
from miles.core.math.ratio import SampleSum, whole_sample


@dataclass(frozen=True)
class LossBatch:
    """The samples of one micro-batch, response tokens packed in the order of ``layout``.

    A column that the objective does not need (see ``Needs``) may be None.  Under context parallelism the columns hold
    this rank's slice of each sample, ``mask_sum_S`` counts whole samples, and ``add`` sums over the context-parallel
    ranks.
    """

    layout: Ragged
    mask_T: torch.Tensor
    """1.0 = trains, 0.0 = does not."""
    advantage_T: torch.Tensor | None = None
    return_T: torch.Tensor | None = None
    old_logp_T: torch.Tensor | None = None
    """Under the policy before the first optimizer step on this rollout; None: the policy of this very forward pass."""
    ref_logp_T: torch.Tensor | None = None
    rollout_logp_T: torch.Tensor | None = None
    old_value_T: torch.Tensor | None = None
    given_mask_sum_S: torch.Tensor | None = None
    """Trainable tokens of each whole sample; None: this rank holds whole samples."""
    given_denominator_S: torch.Tensor | None = None
    """What the per-sample mean divides by; None: the sample's trainable tokens."""
    add: SampleSum = whole_sample
    weight_scale: float = 1.0
    """Factor of the importance weights that makes their mean over the optimizer step 1 (see ``Objective.prepare``)."""
    total_lengths: tuple[int, ...] | None = None
    """Prompt + response tokens of each sample; for users' hooks."""
    tokens: tuple[torch.Tensor, ...] | None = None
    """Prompt + response token ids of each sample; for a custom loss."""

    @cached_property
    def masked_T(self) -> torch.Tensor:
        """True where a token does not train."""
        return self.mask_T == 0

    @cached_property
    def mask_sum_S(self) -> torch.Tensor:
        """Trainable tokens of each whole sample."""
        return self.layout.sum(self.mask_T) if self.given_mask_sum_S is None else self.given_mask_sum_S

    @property
    def denominator_S(self) -> torch.Tensor:
        """What the per-sample mean divides by."""
        return self.mask_sum_S if self.given_denominator_S is None else self.given_denominator_S

    @cached_property
    def share_S(self) -> torch.Tensor:
        """Share of each sample's trainable tokens that this rank holds; 0 for a sample without any."""
        return self.layout.sum(self.mask_T) / self.mask_sum_S.clamp(min=1.0)

    @cached_property
    def trainable(self) -> Tokens:
        """The tokens that train."""
        return Tokens(self.layout, self.mask_T, self.mask_sum_S, self.add)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Sums over one micro-batch.

    Divided by ``Objective.denominator`` of the whole optimizer step, ``loss`` is the loss to differentiate and
    ``token_metrics`` are averages; ``sample_metrics`` are averaged over the step's samples.  See ``MetricSums``.
    """

    loss: torch.Tensor
    """Scalar, differentiable."""
    token_metrics: dict[str, torch.Tensor]
    """Detached scalars, reduced as the loss is."""
    sample_metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Detached scalars, summed over samples."""
