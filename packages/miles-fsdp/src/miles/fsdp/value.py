"""The critic's model on this rank: a language model's body under a value head.

P = tokens of the pack, T = response tokens of its samples, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from miles.core.training.micro_batch import MicroBatch
from miles.core.training.model import Output
from miles.core.training.value_head import read_value_head, write_value_head
from miles.fsdp.layout import Layout
from miles.fsdp.policy import PACKED, RankModule, Trained, whole


class ValueModule(RankModule):
    """Values of the states before each response token.  Takes the place of ``lm``'s output head."""

    def __init__(self, lm: PreTrainedModel, layout: Layout = PACKED) -> None:
        super().__init__(lm, layout)
        head = lm.get_output_embeddings()
        lm.set_output_embeddings(nn.Identity())
        self.value_head = nn.Linear(head.weight.shape[1], 1, device=head.weight.device, dtype=torch.float32)

    def forward(self, batch: MicroBatch, output: Output) -> torch.Tensor:
        """[T], whose product with the head is taken in fp32 whatever the body's precision."""
        assert output == "values", f"a critic has no {output}"
        hidden_TD = self.hidden(batch).index_select(0, batch.rows_T)
        weight, bias = self.value_head.weight, self.value_head.bias
        return functional.linear(hidden_TD.float(), weight.float(), bias.float()).squeeze(1)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        head = {f"value_head.{name}": parameter for name, parameter in self.value_head.named_parameters()}
        return super().trained_parameters() | head

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def read_value_head(self, path: str, seed: int) -> None:
        """Take the head that lies beside the model at ``path``, or start a new one, which ``seed`` determines."""
        self.value_head.load_state_dict(read_value_head(Path(path), self.value_head.in_features, seed))


class Critic(Trained):
    """The critic being trained."""

    module: ValueModule

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def values(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return [self.module(micro_batch, "values") for micro_batch in micro_batches]


def save_value_head(module: ValueModule, directory: Path, *, writes: bool) -> None:
    """Write the head into ``directory`` on the rank that ``writes``.  Collective."""
    tensors = {name: whole(parameter.detach()) for name, parameter in module.value_head.named_parameters()}
    if writes:
        write_value_head(tensors, directory)
