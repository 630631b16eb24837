"""How the samples of a micro-batch lie in the model's input: packed in one row (``thd``), or in a row each (``bshd``).

P = tokens of the pack, D = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from miles.core.training.micro_batch import MicroBatch
from miles.core.training.segments import Segments


class Layout(Protocol):
    """A way to run a model over samples."""

    def hidden(self, body: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """[P, D] last hidden states of the pack."""

    def logits(self, lm: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """[tokens, V] of one sample alone, through the model's own head."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One row without padding between samples, filled up at its end to a ``multiple`` of tokens.

    Nobody sees the filling: attention leaves it out, and its hidden states are cut off.
    """

    multiple: int = 1

    def hidden(self, body: nn.Module, batch: MicroBatch) -> torch.Tensor:
        count = len(batch.tokens_P)
        filling = -count % self.multiple
        ids, positions = (
            functional.pad(x_P, (0, filling)) if filling else x_P for x_P in (batch.tokens_P, batch.positions_P)
        )
        states = body(input_ids=ids[None], position_ids=positions[None], use_cache=False, segments=batch.segments)
        hidden_PD: torch.Tensor = states.last_hidden_state[0, :count]
        return hidden_PD

    def logits(self, lm: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = lm(input_ids=ids[None], use_cache=False, segments=Segments([len(ids)], ids.device)).logits
        return own[0]


@dataclass(frozen=True, slots=True)
class Padded:
    """A row for every sample, all as long as the longest, rounded up to a ``multiple``.

    Padding is at the end of a row, where no causal model looks at it.
    """

    multiple: int = 1

    def hidden(self, body: nn.Module, batch: MicroBatch) -> torch.Tensor:
        longest = max(batch.segments.lengths)
        cells = batch.segments.row_each(longest + -longest % self.multiple)
        ids = cells.spread(batch.tokens_P).view(len(batch.segments.lengths), -1)
        states = body(input_ids=ids, use_cache=False).last_hidden_state
        return cells.collect(states.flatten(0, 1))

    def logits(self, lm: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = lm(input_ids=ids[None], use_cache=False).logits
        return own[0]
