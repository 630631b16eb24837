"""The parameters on this rank, by names that count layers and experts over the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from miles.megatron.adapted_layers import AdaptedLinear, is_adapter

_LAYER = re.compile(r"(.*?\blayers\.)(\d+)(\..*)")
_EXPERT = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)")
# Transformer Engine keeps the experts of a rank in one module, with a number behind each name.
_GROUPED = re.compile(r"(.*\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)")


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter, or this rank's part of one."""

    name: str
    tensor: nn.Parameter
    expert: bool
    owner: nn.Module

    @property
    def group(self) -> dist.ProcessGroup:
        """Ranks that share it."""
        if self.expert:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()

    def values(self) -> torch.Tensor:
        """What others are to see of it: with adapters added, where its layer has some."""
        if isinstance(self.owner, AdaptedLinear) and self.tensor is self.owner.weight:
            return self.owner.merged_weight()
        return self.tensor.detach()


def local_parameters(chunks: Sequence[nn.Module]) -> list[LocalParameter]:
    """All parameters and expert biases of this rank's part of the model, adapters apart."""
    return [parameter for chunk in chunks for parameter in _of_chunk(chunk)]


def _of_chunk(chunk: nn.Module) -> Iterator[LocalParameter]:
    layer_numbers = {
        name: module.layer_number - 1 for name, module in chunk.named_modules() if isinstance(module, TransformerLayer)
    }
    first_expert = _first_expert(chunk.config.num_moe_experts)
    for name, tensor in _tensors(chunk):
        plain = _GROUPED.sub(r"\1.local_experts.\4.\2.\3", name)
        owner = chunk.get_submodule(name.rpartition(".")[0])
        yield LocalParameter(_numbered(plain, layer_numbers, first_expert), tensor, ".experts." in plain, owner)


def _tensors(chunk: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, parameter) for name, parameter in chunk.named_parameters() if not is_adapter(name))
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("router.expert_bias"))


def _first_expert(num_experts: int | None) -> int:
    """The number in the whole model of this rank's first expert."""
    ranks = parallel_state.get_expert_model_parallel_world_size()
    rank: int = parallel_state.get_expert_model_parallel_rank()
    return rank * ((num_experts or 0) // int(ranks))


def _numbered(name: str, layer_numbers: dict[str, int], first_expert: int) -> str:
    """``name`` with the numbers that layer and expert have in the whole model."""
    match = _LAYER.fullmatch(name)
    if match and match[1] + match[2] in layer_numbers:
        name = f"{match[1]}{layer_numbers[match[1] + match[2]]}{match[3]}"
    match = _EXPERT.fullmatch(name)
    return f"{match[1]}{first_expert + int(match[2])}{match[3]}" if match else name
