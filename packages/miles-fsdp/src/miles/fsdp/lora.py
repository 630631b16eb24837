"""Adapters on the linear layers of a transformers model: ``W x + (alpha / r) B A x`` whose ``W`` is frozen.

There is no dropout on them: a policy's log-probabilities are a function of its weights.

r = rank, I = inputs, O = outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from miles.core.weights.adapter_form import PARTS
from miles.core.weights.adapters import LoraSpec, initial_a, read_adapter
from miles.fsdp.loading import decoder_layers


class LoraLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer that has been given an adapter."""

    lora_A: nn.Parameter
    """[r, I]."""
    lora_B: nn.Parameter
    """[O, r]."""
    scale: float
    active: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if self.active:
            out = out + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale
        return out


def add_adapters(model: PreTrainedModel, spec: LoraSpec) -> None:
    """Freeze ``model`` and give its layers adapters: a model without storage gets such adapters, too."""
    model.requires_grad_(False)
    layers = _chosen(model, spec)
    generator = torch.Generator().manual_seed(spec.seed)
    for layer in layers.values():
        _adapt(layer, spec, generator)
    if spec.path is not None and model.device.type != "meta":
        tensors = read_adapter(layers, spec, spec.path)
        with torch.no_grad():
            for name, layer in layers.items():
                for part in PARTS:
                    getattr(layer, part).copy_(tensors[f"{name}.{part}"])


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model that training started from."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def _chosen(model: PreTrainedModel, spec: LoraSpec) -> dict[str, nn.Linear]:
    """Linear layers of the decoder that the flags name."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    }
    chosen = {name: module for name, module in linear.items() if spec.chooses(name)}
    if not chosen:
        raise spec.nothing_chosen(type(model).__name__, linear)
    return chosen


def _adapt(layer: nn.Linear, spec: LoraSpec, generator: torch.Generator) -> None:
    outputs, inputs = layer.weight.shape
    layer.__class__ = LoraLinear
    device = layer.weight.device
    a = torch.empty(spec.rank, inputs, device=device)
    if device.type != "meta":
        a.copy_(initial_a(spec.rank, inputs, generator))
    layer.lora_A = nn.Parameter(a)
    layer.lora_B = nn.Parameter(torch.zeros(outputs, spec.rank, device=device))
    layer.scale, layer.active = spec.scale, True
