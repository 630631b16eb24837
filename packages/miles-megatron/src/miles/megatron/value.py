"""The critic's head on Megatron-Core: in the place of the output layer, on the last stage.

L = tokens of a row on this context-parallel rank, U = response tokens predicted on this rank, T = those of the
micro-batch, D = hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from miles.core.training.model import Output
from miles.core.training.value_head import read_value_head
from miles.megatron.hf_files import HfTensors
from miles.megatron.language_model import LanguageModel, whole_samples
from miles.megatron.model_map import Rule, WeightMap
from miles.megatron.packed_inputs import PackedInputs

PREFIX = "value_head."
_RULES = tuple(Rule(f"output_layer.{name}", (PREFIX + name,)) for name in ("weight", "bias"))


class ValueHead(nn.Linear):  # type: ignore[misc]
    """One number from a hidden state, in fp32 whatever the body's precision.  Whole on every tensor-parallel rank."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        super().__init__(hidden_size, 1, device=device, dtype=torch.float32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden.float(), self.weight, self.bias).squeeze(-1)


class ValueReader:
    """From hidden states to values of response tokens."""

    def __call__(
        self, model: LanguageModel, hidden: torch.Tensor, inputs: PackedInputs, output: Output
    ) -> torch.Tensor:
        """[T], the same on all ranks that share the samples."""
        assert output == "values", f"a critic has no {output}"
        if model.config.sequence_parallel:
            # Every rank computes the same from all states, and takes its part of their gradient back.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        values_U = model.output_layer(hidden.squeeze(1).index_select(0, inputs.rows_U))
        return whole_samples(values_U, inputs)


class CriticTensors(HfTensors):
    """A model in Hugging Face format with the value head beside it, or a new one, which ``seed`` determines."""

    def __init__(self, directory: Path, hidden_size: int, seed: int) -> None:
        super().__init__(directory)
        self._head = read_value_head(directory, hidden_size, seed)

    def get(self, name: str) -> torch.Tensor:
        return self._head[name.removeprefix(PREFIX)] if name.startswith(PREFIX) else super().get(name)


def critic_weights(weights: WeightMap) -> WeightMap:
    """The body's rules, and the head's before those of the output layer, whose place it takes."""
    return WeightMap((*_RULES, *weights.rules))
